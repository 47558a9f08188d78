"""Limits on the thinking of every kind of system, held against the model's own generate, cut by hand."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flexalign.data.logits import LogitsSettings
from flexalign.data.prompting import PromptSettings
from flexalign.errors import ConfigError
from flexalign.lambdas import AS_IT_IS, Setting
from flexalign.miniature import SYSTEM
from flexalign.models.prompted import PromptPair
from flexalign.systems import PromptRequest, SystemOptions, open_backend, parse_system

ASKED = ["3+14+15?", "7+7+7?", "12+5+7+1?"]
BUDGET, STEPS = 13, 60
PROMPTS = PromptPair(PromptSettings(), PromptSettings(system=SYSTEM))
SYSTEMS = [
    ("model:miniature", []),
    ("dial:miniature,miniature:fast", [0.0, 0.4]),
    ("dial:miniature,miniature:dial", [0.0, 1.0, 3.0]),
    ("pair:miniature", [0.0, 0.5, 2.0]),
    ("prompts:miniature:hybrid", [0.0, 0.5, 1.0]),
]


def answered(name: str, lams: Sequence[float], **options: Any) -> tuple[Any, list[Any]]:
    settings = [Setting.of(lam) for lam in lams]
    given = {"prompts": PROMPTS} if name.startswith("prompts") else {}
    backend: Any = open_backend(
        parse_system(name),
        settings,
        SystemOptions(max_new_tokens=STEPS, temperature=0, **given, **options),
    )
    requests = [
        PromptRequest(place, [{"role": "user", "content": text}], setting, 0, 5)
        for place, text in enumerate(ASKED)
        for setting in settings or [AS_IT_IS]
    ]
    return backend, [pair for block in backend.run(requests, set()) for pair in block]


def by_hand(backend: Any, request: PromptRequest) -> str:
    """Write greedily, cut the thinking after the budget, close it, and write on."""
    tokenizer, model = backend.text.tokenizer, backend.model
    prompt = backend.text.prompt(request.messages)
    more: dict[str, Any] = {} if request.setting.lam is None else {"lam": request.setting.lam}
    inputs: dict[str, Any]
    if backend.kind == "prompts":
        inputs = dict(model.encode([prompt]))
    else:
        inputs = dict(
            tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        )
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def write(ids: list[int], steps: int) -> list[int]:
        longer = {
            name: torch.cat(
                [value, torch.tensor([ids if name.endswith("ids") else [1] * len(ids)])], 1
            ).long()
            for name, value in inputs.items()
        }
        written = model.generate(**longer, **more, max_new_tokens=steps, do_sample=False)
        return list(written[0, longer["input_ids"].shape[1] :].tolist())

    close = tokenizer.convert_tokens_to_ids("</think>")
    whole = write([], STEPS)
    if close not in whole[: BUDGET + 2]:
        kept = [*whole[: BUDGET + 1], close]  # the first token is the opening tag
        whole = [*kept, *write(kept, STEPS - len(kept))]
    return str(tokenizer.decode(whole, skip_special_tokens=False)).partition("<eos>")[0].strip()


@pytest.mark.parametrize(("name", "lams"), SYSTEMS)
def test_a_budget_cuts_closes_and_goes_on(name: str, lams: list[float]) -> None:
    backend, answers = answered(name, lams, logits=LogitsSettings(thinking_budget=BUDGET))
    cut = 0
    for request, answer in answers:
        expected = by_hand(backend, request)
        assert answer.text.split() == expected.split()
        # The tokens that close the thinking are tokens of the answer; the miniature's are words.
        assert answer.tokens == len(answer.text.split())
        assert answer.thinking_tokens <= BUDGET
        cut += answer.thinking_tokens == BUDGET
    assert cut


def test_a_bias_on_the_end_shortens_the_thinking_of_a_dial() -> None:
    tokens = []
    for bias in (0.0, 40.0):
        options = {"logits": LogitsSettings(end_of_thinking_bias=bias)}
        _, answers = answered("dial:miniature,miniature:dial", [0.0, 3.0], **options)
        tokens.append([answer.thinking_tokens for _, answer in answers])
    # The opening tag is not biased, and then the thinking is closed at once.
    assert set(tokens[1]) == {0}
    assert min(tokens[0]) > 10


def test_a_server_refuses_limits_on_the_thinking_and_vllm_a_bias() -> None:
    def opened(name: str, engine: str = "local", **limits: Any) -> Any:
        options = SystemOptions(logits=LogitsSettings(**limits), engine=engine)
        return open_backend(parse_system(name), (), options)

    server = "url:http://127.0.0.1:1"
    with pytest.raises(ConfigError, match=r"^thinking_budget and end_of_thinking_bias: a server"):
        opened(server, thinking_budget=5, end_of_thinking_bias=1)
    with pytest.raises(ConfigError, match=r"^thinking_budget: a server cannot apply this"):
        opened(server, thinking_budget=5)
    with pytest.raises(ConfigError, match=r"^end_of_thinking_bias: --engine vllm cannot apply"):
        opened("model:miniature", "vllm", thinking_budget=5, end_of_thinking_bias=1)


def test_vllm_is_told_a_budget_and_the_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    class Engine:
        def __init__(self, **options: Any) -> None:
            told["engine"] = options

        def generate(self, prompts: Any, sampling: list[Any], **_: Any) -> list[Any]:
            told["sampling"] = sampling
            output = SimpleNamespace(text="<think> 1 </think> 3", token_ids=[7] * 5)
            output.finish_reason = "stop"
            return [SimpleNamespace(outputs=[output]) for _ in prompts]

    fake: Any = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = Engine, lambda **options: options
    fake.__spec__ = SimpleNamespace(name="vllm")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for budget in (None, 5):
        answered(
            "model:miniature", [], logits=LogitsSettings(thinking_budget=budget), engine="vllm"
        )
        sent = {one.get("thinking_token_budget") for one in told["sampling"]}
        assert sent == {budget}
        assert all("thinking_budget" not in one for one in told["sampling"])
        tags = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
        assert told["engine"].get("reasoning_config") == (None if budget is None else tags)


def test_a_model_without_tags_is_refused_before_its_weights_are_loaded(
    tmp_path: Path, tiny_model: Any
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny_model().config.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")),
        unk_token="?",
    ).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="need the tags around a model's thinking"):
        open_backend(
            parse_system(f"model:{tmp_path}"),
            (),
            SystemOptions(logits=LogitsSettings(thinking_budget=5)),
        )
