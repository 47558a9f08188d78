import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from flexalign.data.logits import LogitsSettings
from flexalign.data.prompting import PromptSettings
from flexalign.errors import ConfigError, LambdaError
from flexalign.evaluation.systems import Cell
from flexalign.inra import InRaModel
from flexalign.lambdas import AS_IT_IS, Setting, unique_settings
from flexalign.models.loading import fingerprint
from flexalign.models.prompted import PairRendering, PromptPair
from flexalign.systems import System, SystemOptions, open_backend, parse_system, parse_systems
from flexalign.systems.local import TwoPromptText


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ("model:out/lambda=2", System("model:lambda=2", "model", ("out/lambda=2",))),
        ("ref=model:a/b", System("ref", "model", ("a/b",))),
        ("dial:a,b", System("dial:a,b", "dial", ("a", "b"))),
        (
            "mine=url:http://localhost:8000/v1",
            System("mine", "url", ("http://localhost:8000/v1",)),
        ),
        (
            "pair:miniature",
            System("pair:miniature,miniature:aligned", "pair", ("miniature", "miniature:aligned")),
        ),
        ("λ 2=interpolate:x/r,y/a", System("λ 2", "interpolate", ("x/r", "y/a"))),
    ],
)
def test_a_system_is_read(text: str, system: System) -> None:
    assert parse_system(text) == system


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("miniature", r"is no system.*\(such as model:miniature\)"),
        ("modl:x", "is no system"),
        ("dial:a", "dial takes 2 models"),
        ("pair:a,b,c", "pair takes 2 models"),
        ("pair:a,", "pair takes 2 models"),
    ],
)
def test_what_is_no_system_is_said(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_system(text)


def test_two_systems_need_two_names() -> None:
    with pytest.raises(ConfigError, match=r"two systems are called 'model:m'; put a name"):
        parse_systems(["model:a/m", "model:b/m"])


def test_an_adapters_range_is_kept(tiny_pair, tmp_path) -> None:
    InRaModel.create(str(tiny_pair.reference)).save_pretrained(tmp_path / "adapter")
    system = System("d", "dial", (str(tiny_pair.reference), str(tmp_path / "adapter")))
    settings = unique_settings([0, 2])
    with pytest.raises(LambdaError, match=r"λ=2: outside the range \[0, 1\].*--lambda-range"):
        open_backend(system, settings, SystemOptions())
    backend = open_backend(system, settings, SystemOptions(lambda_range=(0, 2)))
    first, second = backend.describe()["parts"]
    assert len(first["fingerprint"]) == len(second["fingerprint"]) == 16
    with pytest.raises(ConfigError, match="there is no adapter 'nowhere'"):
        open_backend(
            System("d", "dial", (str(tiny_pair.reference), "nowhere")), [], SystemOptions()
        )


def test_vllm_is_asked_for_where_it_is_not(tiny_pair) -> None:
    model = System("m", "model", (str(tiny_pair.reference),))
    with pytest.raises(ConfigError, match=r"needs vllm.*flexalign\[vllm\]"):
        open_backend(model, [], SystemOptions(engine="vllm"))
    with pytest.raises(ConfigError, match=r"exit 0.9: --engine vllm cannot close a thinking"):
        open_backend(model, unique_settings(["exit 0.9"]), SystemOptions(engine="vllm"))
    pair = System("p", "pair", tuple(map(str, tiny_pair)))
    with pytest.raises(ConfigError, match="runs plain models"):
        open_backend(pair, [], SystemOptions(engine="vllm"))


def test_vllm_is_asked_in_its_own_way(tiny_pair, tiny_tokenizer, monkeypatch, tmp_path) -> None:
    """The adapter against a stand-in that answers as vLLM's offline engine does."""
    asked = []

    class Engine:
        def __init__(self, **options):
            asked.append(options)

        def generate(self, prompts, sampling, use_tqdm):
            asked.append((prompts, sampling, use_tqdm))
            outputs = [
                SimpleNamespace(text="<think>1+2</think>3", token_ids=[7] * 9, finish_reason=why)
                for why in ("stop", "length")
            ]
            return [SimpleNamespace(outputs=[output]) for output in outputs]

    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = Engine, lambda **options: options
    fake.__spec__ = SimpleNamespace(name="vllm")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    system = System("m", "model", (str(tiny_pair.reference),))
    logits = LogitsSettings(top_k=20, frequency_penalty=0.5, logit_bias=((3, 1.0),))
    options = SystemOptions(engine="vllm", max_new_tokens=9, logits=logits)
    backend = open_backend(system, [AS_IT_IS], options)
    messages = [{"role": "user", "content": "one plus two"}]
    cells = [Cell(AS_IT_IS, "t", "1", n, 40 + n, messages) for n in range(3)]
    [outcomes] = backend.run(cells, {cells[0].key})
    assert [cell for cell, _ in outcomes] == cells[1:]
    answers = [answer for _, answer in outcomes]
    assert [(a.tokens, a.truncated) for a in answers] == [(8, False), (9, True)]
    thinking = len(tiny_tokenizer("1+2", add_special_tokens=False)["input_ids"])
    assert answers[0].thinking_tokens == thinking
    prompts, sampling, _ = asked[1]
    expected = tiny_tokenizer(backend.render(messages), add_special_tokens=False)["input_ids"]
    assert prompts == [{"prompt_token_ids": expected}] * 2
    assert [one["seed"] for one in sampling] == [41, 42]
    assert sampling[0]["max_tokens"] == 9
    limits = {"top_k": 20, "frequency_penalty": 0.5, "logit_bias": {3: 1.0}}
    assert limits.items() <= sampling[0].items()
    assert not {"min_p", "repetition_penalty", "presence_penalty"} & sampling[0].keys()
    facts = backend.describe()
    assert facts["engine"] == "vllm"
    assert facts["parts"][0]["fingerprint"] == fingerprint(tiny_pair.reference)
    assert facts["thinking_tags"] == ["<think>", "</think>"]
    backend.release()
    list(backend.run(cells, {cells[0].key}))
    assert len([one for one in asked if isinstance(one, dict)]) == 2  # it was started anew
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    peft = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_pair.reference)}
    (adapter / "adapter_config.json").write_text(json.dumps(peft))
    with pytest.raises(ConfigError, match=r"no whole model in safetensors.*merge the adapter"):
        open_backend(System("a", "model", (str(adapter),)), [AS_IT_IS], options)


def test_one_model_under_two_prompts_is_a_system() -> None:
    prompts = PromptPair(aligned=PromptSettings(system="check ;"))
    assert parse_system("told=prompts:models/base") == System("told", "prompts", ("models/base",))
    assert System.of("a", prompts=prompts) == System("prompts", "prompts", ("a",))
    with pytest.raises(ConfigError, match="leave them out, or --adapter"):
        System.of("a", "b", prompts=prompts)
    for none in (None, PromptPair()):
        options = SystemOptions(prompts=none)
        with pytest.raises(ConfigError, match="prompts:miniature needs two prompts"):
            open_backend(parse_system("prompts:miniature"), options=options)
    options = SystemOptions(prompts=prompts, engine="vllm")
    with pytest.raises(ConfigError, match="runs plain models"):
        open_backend(parse_system("prompts:miniature"), options=options)
    with pytest.raises(LambdaError, match=r"-1"):
        open_backend(
            parse_system("prompts:miniature"), [Setting.of(-1.0)], SystemOptions(prompts=prompts)
        )


def test_a_response_is_read_by_the_prompt_that_opens_the_thinking(hybrid_tokenizer: Any) -> None:
    """One prompt leaves the thinking open, and the other has closed it."""
    prompts = PromptPair(aligned=PromptSettings({"enable_thinking": False}))
    text = TwoPromptText(PairRendering(hybrid_tokenizer, prompts))
    messages = [{"role": "user", "content": "1+2="}]
    assert text.whole(messages, "one\n</think>\n\n3") == "<think>one\n</think>\n\n3"
    assert text.whole(messages, "3") == "3"
    assert text.opens(messages, Setting.of(0.0))
    assert not text.opens(messages, Setting.of(1.0))
    assert text.opens(messages, Setting.of("adaptive 0.5"))
    assert text.length(messages) == text.prompt(messages).longest
    assert text.render(messages).startswith("[reference]\n<|im_start|>user\n1+2=")
