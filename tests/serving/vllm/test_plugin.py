"""What the plugin does in vLLM's processes, without an engine."""

import gc
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flexalign.errors import ConfigError, ServingError, UnsupportedModelError
from flexalign.serving.vllm import plugin
from flexalign.serving.vllm.folder import prepare_folder
from flexalign.serving.vllm.lambdas import (
    ARCHITECTURES,
    LORA_ARCHITECTURES,
    DialSettings,
    TokenLambdas,
)
from flexalign.serving.vllm.plugin import refuse_unsupported

pytestmark = pytest.mark.filterwarnings("ignore")  # what vLLM warns of is not ours to mend
SETTINGS = DialSettings(default_lambda=0.25, thinking_tokens=(4, 5))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return prepare_folder("miniature", "miniature:fast", tmp_path_factory.mktemp("out") / "folder")


@pytest.fixture
def config(vllm, folder):
    """The configuration that vLLM makes of options."""
    from vllm.engine.arg_utils import EngineArgs

    def make(**options):
        given = {"model": str(folder), "dtype": "float32", "enforce_eager": True} | options
        return EngineArgs(**given).create_engine_config()

    return make


@pytest.fixture
def unhooked(vllm, monkeypatch):
    """The runner and the parameters as they are without the plugin."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for kind, name in ((GPUModelRunner, "_model_forward"), (SamplingParams, "verify")):
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, getattr(method, "__wrapped__", method))
    return GPUModelRunner


@pytest.mark.parametrize(
    ("version", "serves"),
    [("0.32.0", True), ("0.32.1+cpu", True), ("0.31.9", False), ("0.320.0", False), ("1.0", False)],
)
def test_the_range_of_versions(version, serves, monkeypatch):
    monkeypatch.setattr(plugin, "_installed", lambda: version)
    if serves:
        plugin.require_supported()
        return
    with pytest.raises(ConfigError, match=rf"on vLLM 0.32.x, and {version} is installed; install"):
        plugin.require_supported()


def test_another_version_is_tried_where_the_environment_says_so(monkeypatch, caplog):
    monkeypatch.setattr(plugin, "_installed", lambda: "0.33.0")
    monkeypatch.setenv("FLEXALIGN_VLLM_ANY", "1")
    plugin.require_supported()
    assert "vLLM 0.33.0: flexalign was tried on 0.32.x alone" in caplog.text
    caplog.clear()
    monkeypatch.setattr(plugin, "_installed", lambda: "0.32.0")
    plugin.require_supported()
    assert not caplog.text
    monkeypatch.setattr(plugin, "_installed", lambda: "0.33.0")
    monkeypatch.setenv("FLEXALIGN_VLLM_ANY", "yes")
    with pytest.raises(ConfigError, match="FLEXALIGN_VLLM_ANY=yes: write 1"):
        plugin.require_supported()


def test_outside_the_range_nothing_is_changed(unhooked, monkeypatch):
    from vllm import ModelRegistry
    from vllm.sampling_params import SamplingParams

    monkeypatch.setattr(plugin, "_installed", lambda: "0.33.0")
    original = SamplingParams.verify
    plugin.register()
    assert SamplingParams.verify is original
    ours = {*ARCHITECTURES.values(), *LORA_ARCHITECTURES.values()}
    assert ours <= set(ModelRegistry.get_supported_archs())


def test_a_vllm_of_another_shape_breaks_nobody(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.WARNING, "flexalign.serving"):
        plugin.register()
    assert "could not be registered" in caplog.text


def test_registering_twice_hooks_once(unhooked):
    from vllm.sampling_params import SamplingParams

    plugin.register()
    hooked = SamplingParams.verify
    plugin.register()
    assert SamplingParams.verify is hooked


def test_requests_to_models_of_others_are_not_looked_at(unhooked, monkeypatch):
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    seen = []
    monkeypatch.setattr(SamplingParams, "verify", lambda self, *args: seen.append(args))
    plugin.register()
    params = SamplingParams(extra_args={"lambda": "abc"})
    params.verify(SimpleNamespace(hf_config=SimpleNamespace()), 1, 2, 3)
    assert len(seen) == 1
    ours = SimpleNamespace(hf_config=SimpleNamespace(flexalign=SETTINGS.to_json()))
    with pytest.raises(VLLMValidationError, match="got 'abc'") as caught:
        params.verify(ours, 1, 2, 3)
    assert (caught.value.parameter, caught.value.value) == ("lambda", "abc")
    assert len(seen) == 2


def test_the_check_tells_a_runner_with_the_hook_from_one_without(unhooked):
    from flexalign.serving.vllm import runner_v1

    with pytest.raises(ServingError, match="λ would not arrive: vLLM's GPUModelRunner"):
        runner_v1.require_delivery()
    runner_v1.install()
    hooked = unhooked._model_forward
    runner_v1.install()
    assert unhooked._model_forward is hooked
    runner_v1.require_delivery()


def test_the_check_sees_a_runner_that_goes_its_own_way(unhooked):
    from flexalign.serving.vllm import runner_v1

    class Other(unhooked):
        def _model_forward(self, input_ids=None, positions=None, **kwargs):
            return self.model(input_ids=input_ids, positions=positions)

    runner_v1.install()
    with pytest.raises(ServingError, match="vLLM's Other does not"):
        runner_v1.require_delivery()
    del Other
    gc.collect()  # of subclasses there are weak references alone, and cycles to hold them


def test_the_check_says_why_a_runner_of_another_shape_fails(unhooked):
    from flexalign.serving.vllm import runner_v1

    class Other(unhooked):
        def _model_forward(self, *args, **kwargs):
            return self.no_such_part

    runner_v1.install()
    with pytest.raises(
        ServingError, match=r"Other does not run .*\(AttributeError: .*no_such_part"
    ):
        runner_v1.require_delivery()
    del Other
    gc.collect()


def test_a_model_without_a_dial_runs_as_it_did(unhooked):
    from flexalign.serving.vllm import runner_v1

    runner_v1.install()
    plain = object.__new__(unhooked)
    plain.model = lambda **inputs: inputs["positions"]
    assert plain._model_forward(input_ids=None, positions="as they were") == "as they were"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "LoRA.*merge the LoRA"),
        ({"enable_prompt_embeds": True}, "embeddings as prompts"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism.*use --tensor-parallel-size"),
        ({"kv_cache_dtype": "fp8_e5m2"}, r"a quantised KV cache \(fp8_e5m2\)"),
        ({"runner": "pooling"}, "the runner pooling"),
        ({"hf_overrides": {"dual_chunk_attention_config": {"chunk_size": 8}}}, "dual chunk"),
        ({"hf_overrides": {"is_causal": False}}, "attention that is not causal"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_could_be_wrong_is_refused(config, options, message):
    refused = config(**options)
    with pytest.raises(
        UnsupportedModelError, match=f"^a model with a dial is not served with {message}"
    ):
        refuse_unsupported(refused)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "enable_dbo", True, "batches that are run in two halves"),
        ("model_config", "quantization", "fp8", r"quantised weights \(fp8\)"),
        ("speculative_config", "method", "eagle", "speculation by eagle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_vllm_does_not_offer_on_a_cpu_is_refused_elsewhere(
    config, part, field, value, message
):
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    refused = config(speculative_config=drafts)
    assert hasattr(getattr(refused, part), field)
    setattr(getattr(refused, part), field, value)
    with pytest.raises(UnsupportedModelError, match=message):
        refuse_unsupported(refused)


def test_what_was_tried_is_not_refused(config):
    refuse_unsupported(config())
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    refuse_unsupported(config(speculative_config=drafts, tensor_parallel_size=2))


class _Runner2:
    """What model runner V2 hands to a model's state, made by hand."""

    def __init__(self, tokens):
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        from flexalign.serving.vllm.runner_v2 import DialModelState

        self.model = SimpleNamespace(lambdas=TokenLambdas(torch.zeros(tokens), SETTINGS))
        self.state = object.__new__(DialModelState)
        assert isinstance(self.state, DefaultModelState)
        self.state.model = self.model
        self.state.rope_state = self.state.prompt_embeds_state = None
        self.state._dials = {}

    def add(self, index, lam, prompt, output=()):
        extra_args = None if lam is None else {"lambda": lam}
        data = SimpleNamespace(
            prompt_token_ids=prompt,
            prefill_token_ids=[*prompt, *output],
            sampling_params=SimpleNamespace(extra_args=extra_args),
        )
        self.state.add_request(index, data)

    def run(self, *rows):
        """Run rows of (index, first position, tokens); return λ by token."""
        counts = [len(tokens) for _, _, tokens in rows]
        flat = [token for _, _, tokens in rows for token in tokens]
        places = [start + i for _, start, tokens in rows for i in range(len(tokens))]
        padding = [0] * 2
        batch = SimpleNamespace(
            num_reqs=len(rows),
            idx_mapping_np=np.array([index for index, _, _ in rows] + padding),
            query_start_loc_np=np.array([0, *np.cumsum(counts), *[len(flat)] * 2]),
            positions=torch.tensor(places + padding),
            input_ids=torch.tensor(flat + padding),
        )
        assert self.state.prepare_inputs(batch, None) == {}
        return self.model.lambdas.values[: len(flat)].tolist()


def test_model_runner_2_gets_its_lambda_by_the_official_hook(vllm):
    runner = _Runner2(16)
    linear = {"kind": "linear", "start": 0, "end": 1, "steps": 4}
    thinking = {"kind": "thinking", "think": 0.0, "answer": 1.0}
    runner.add(3, 2.0, [6, 6])
    runner.add(0, linear, [6, 6, 6])
    runner.add(1, thinking, [6, 4])
    runner.add(2, None, [6])
    found = runner.run((3, 0, [6, 6]), (0, 0, [6, 6, 6]), (1, 0, [6, 4]), (2, 0, [6]))
    assert found == [2.0, 2.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.25]
    assert runner.run((0, 3, [7, 8]), (1, 2, [5])) == [0.25, 0.5, 1.0]
    runner.add(3, linear, [6, 6], output=[7, 7])  # the slot's next request, preempted before
    assert runner.run((3, 2, [7, 7, 7]), (0, 5, [9])) == [0.25, 0.5, 0.75, 0.75]


def test_a_model_with_a_dial_brings_its_state(vllm):
    from flexalign.serving.vllm import models, runner_v2

    for name in (*ARCHITECTURES.values(), *LORA_ARCHITECTURES.values()):
        assert getattr(models, name).get_model_state_cls() is runner_v2.DialModelState
    runner_v2.require_delivery(None, object.__new__(models.InRaLlamaForCausalLM))
    with pytest.raises(ServingError, match="does not ask the model"):
        runner_v2.require_delivery(None, SimpleNamespace(get_model_state_cls=lambda: object))


def test_a_head_that_is_not_linear_is_refused(vllm):
    from flexalign.serving.vllm import models

    model = object.__new__(models.InRaLlamaForCausalLM)
    torch.nn.Module.__init__(model)
    model.lm_head = SimpleNamespace(weight=torch.zeros(2, 2))
    model.logits_processor = SimpleNamespace(scale=1.0, soft_cap=None)
    model._require_linear_head()
    model.logits_processor = SimpleNamespace(scale=1.0, soft_cap=30.0)
    with pytest.raises(UnsupportedModelError, match="InRaLlamaForCausalLM: its head is not linear"):
        model._require_linear_head()


def test_the_entry_point_is_declared():
    from importlib.metadata import entry_points

    [found] = [e for e in entry_points(group="vllm.general_plugins") if e.name == "flexalign"]
    assert found.load() is plugin.register


LORA = DialSettings(1, 0.25, (4, 5), {"model.layers.0.mlp.down_proj": [4]})


def test_a_lora_dial_refuses_what_could_hand_its_cache_on(config):
    transfer = config()
    transfer.kv_transfer_config = SimpleNamespace(kv_connector="any")
    refuse_unsupported(transfer)  # InRa's keys and values depend on no λ
    transfer.model_config.hf_config.flexalign = LORA.to_json()
    with pytest.raises(UnsupportedModelError, match=r"a KV connector.*--kv-transfer-config"):
        refuse_unsupported(transfer)
    transfer.kv_transfer_config = None
    refuse_unsupported(transfer)
    transfer.lora_config = SimpleNamespace()
    with pytest.raises(UnsupportedModelError, match="LoRA beside the dial's own"):
        refuse_unsupported(transfer)


@pytest.fixture
def processor(vllm, monkeypatch):
    """vLLM's InputProcessor with the plugin, whose own work is one request of three tokens."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    def process_inputs(self, params, **options):
        given = {"cache_salt": None, "resumable": False, "prompt_token_ids": [6, 6, 6]}
        return SimpleNamespace(sampling_params=params.clone(), **given | options)

    monkeypatch.setattr(InputProcessor, "process_inputs", process_inputs)
    plugin.separate_prefixes()

    def process(settings, lam, **options):
        one = object.__new__(InputProcessor)
        one.model_config = SimpleNamespace(hf_config=SimpleNamespace())
        if settings is not None:
            one.model_config.hf_config.flexalign = settings.to_json()
        params = SamplingParams(extra_args={} if lam is None else {"lambda": lam})
        before = dict(params.extra_args)
        request = one.process_inputs(params, **options)
        assert params.extra_args == before, "a client's parameters stay as they are"
        return request

    return process


def test_requests_to_a_lora_dial_are_salted_by_their_lambda(processor):
    def salt(lam, **options):
        request = processor(LORA, lam, **options)
        assert request.sampling_params.extra_args["flexalign_salted"] is True
        return request.cache_salt

    assert salt(0.5) == salt(0.5) == salt(0.5, prompt_token_ids=[7])
    assert salt(None) == salt(0.25)
    assert len({salt(0.5), salt(0.75), salt(0.5, cache_salt="mine"), salt(None)}) == 4
    with pytest.raises(Exception, match="streamed"):
        salt(0.5, resumable=True)


@pytest.mark.parametrize("settings", [None, SETTINGS], ids=["plain", "InRa"])
def test_other_models_share_prefixes_as_they_did(processor, settings):
    request = processor(settings, 0.5, cache_salt="mine")
    assert request.cache_salt == "mine"
    assert request.sampling_params.extra_args == {"lambda": 0.5}


def test_the_check_tells_a_salted_vllm_from_one_that_is_not(processor, monkeypatch):
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor

    plugin.require_separate_prefixes()
    hooked = InputProcessor.process_inputs
    plugin.separate_prefixes()
    assert InputProcessor.process_inputs is hooked
    with monkeypatch.context() as patched:
        patched.setattr(InputProcessor, "process_inputs", hooked.__wrapped__)
        with pytest.raises(ServingError, match="share a cached prefix"):
            plugin.require_separate_prefixes()
    for broken in (lambda *_: (None, 0), lambda: None):
        with monkeypatch.context() as patched:
            patched.setattr(kv_cache_utils, "generate_block_hash_extra_keys", broken)
            with pytest.raises(ServingError, match="share a cached prefix"):
                plugin.require_separate_prefixes()
