"""Limits, penalties and biases of every kind of system, held against transformers' own generate."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flexalign.data.logits import LogitsSettings
from flexalign.data.prompting import PromptSettings
from flexalign.errors import ConfigError
from flexalign.generation.responses import generate_responses
from flexalign.generation.text import ResponseText
from flexalign.lambdas import AS_IT_IS, Setting
from flexalign.models.loading import load_model, load_tokenizer
from flexalign.models.prompted import PromptPair
from flexalign.systems import (
    LocalBackend,
    PromptRequest,
    SystemOptions,
    open_backend,
    parse_system,
)

STEPS = 12
ASKED = [
    [{"role": "user", "content": text}]
    for text in ("one plus two", "what is one and two and three", "3+14+15?")
]
PENALISED = LogitsSettings(repetition_penalty=2.5, presence_penalty=6.0, frequency_penalty=5.0)
MINIATURE_SYSTEMS = [
    "model:miniature:reference",
    "dial:miniature:reference,miniature:fast",
    "dial:miniature:reference,miniature:dial",
    "pair:miniature",
]


def recompute(model: Any, ids: list[int], settings: LogitsSettings, ends: set[int]) -> list[int]:
    """Decode greedily from whole forward passes; the penalties are written out token by token."""
    written: list[int] = []
    while len(written) < STEPS:
        with torch.no_grad():
            logits = model(torch.tensor([ids + written])).logits[0, -1].double()
        for token, bias in settings.logit_bias:
            logits[token] += bias
        for token in set(ids + written):
            factor = settings.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(written):
            logits[token] -= settings.presence_penalty
            logits[token] -= settings.frequency_penalty * written.count(token)
        token = int(logits.argmax())
        if token in ends:
            break
        written.append(token)
    return written


def answers(system: str, settings: list[Any], turns: Any = ASKED, **options: Any) -> list[str]:
    """Answer prompts of different lengths at some settings; the texts, prompt by prompt."""
    asked = [Setting.of(setting) for setting in settings]
    backend = open_backend(
        parse_system(system), asked, SystemOptions(max_new_tokens=STEPS, **options)
    )
    requests = [
        PromptRequest(place, messages, setting, 0, 7 + place)
        for place, messages in enumerate(turns)
        for setting in asked or [getattr(backend, "default", AS_IT_IS)]
    ]
    found = {
        request.key: answer for batch in backend.run(requests, ()) for request, answer in batch
    }
    return [found[request.key].text for request in requests]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        (LogitsSettings(repetition_penalty=1.7), {"repetition_penalty": 1.7}),
        (
            LogitsSettings(repetition_penalty=0.8, logit_bias=((70, 9.0), (71, -50.0))),
            {"repetition_penalty": 0.8, "sequence_bias": [[[70], 9.0], [[71], -50.0]]},
        ),
    ],
)
def test_a_batch_writes_what_transformers_writes_alone(
    tiny_pair: Any, settings: LogitsSettings, own: dict[str, Any]
) -> None:
    model, tokenizer = load_model(tiny_pair.reference), load_tokenizer(tiny_pair.reference)
    found = generate_responses(
        model, tokenizer, ASKED, max_new_tokens=STEPS, temperature=0, logits=settings
    )
    plain = generate_responses(model, tokenizer, ASKED, max_new_tokens=STEPS, temperature=0)
    assert found != plain
    for response, messages in zip(found, ASKED, strict=True):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        written = model.generate(ids, do_sample=False, max_new_tokens=STEPS, **own)
        expected = written[0, ids.shape[1] :].tolist()
        assert list(response.token_ids) == [t for t in expected if t != tokenizer.eos_token_id]


def test_occurrences_are_penalised_as_written_out(tiny_pair: Any) -> None:
    model, tokenizer = load_model(tiny_pair.reference), load_tokenizer(tiny_pair.reference)
    found = generate_responses(
        model, tokenizer, ASKED, max_new_tokens=STEPS, temperature=0, logits=PENALISED
    )
    for response, messages in zip(found, ASKED, strict=True):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = {tokenizer.eos_token_id}
        assert list(response.token_ids) == recompute(model, ids, PENALISED, ends)


@pytest.mark.parametrize("system", MINIATURE_SYSTEMS)
def test_the_slow_end_of_every_dial_is_penalised_as_the_plain_model(system: str) -> None:
    model, tokenizer = load_model("miniature"), load_tokenizer("miniature")
    reader = ResponseText(tokenizer)
    ends = {tokenizer.eos_token_id}
    settings = [] if system.startswith("model") else [0]
    found = answers(system, settings, temperature=0, logits=PENALISED)
    expected = []
    for messages in ASKED:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected.append(reader.read(recompute(model, ids, PENALISED, ends)))
    assert found == expected
    assert found != answers(system, settings, temperature=0)


@pytest.mark.parametrize("system", MINIATURE_SYSTEMS[1:])
def test_settings_that_share_a_prefill_are_penalised_as_each_alone(system: str) -> None:
    settings = [0, 0.5, 1]
    together = answers(system, settings, temperature=0, logits=PENALISED)
    for place, setting in enumerate(settings):
        alone = answers(system, [setting], temperature=0, logits=PENALISED)
        assert together[place :: len(settings)] == alone


@pytest.mark.parametrize("system", MINIATURE_SYSTEMS)
def test_the_likeliest_token_alone_is_greedy(system: str) -> None:
    sampled = answers(system, [], temperature=1, top_p=1, logits=LogitsSettings(top_k=1))
    assert sampled == answers(system, [], temperature=0)
    assert sampled == answers(system, [], temperature=1, top_p=1, logits=LogitsSettings(min_p=1.0))


def test_a_policys_fast_answer_is_biased_too() -> None:
    """Without the likeliest answers another one is written, and accepted as it is."""
    system, policy = "dial:miniature,miniature:fast", {"policy": "adaptive", "threshold": 0.0}
    sums = [[{"role": "user", "content": text}] for text in ("3+14+15?", "9+3+6?")]
    plain = answers(system, [1], sums, temperature=0)
    tokenizer = load_tokenizer("miniature")
    likeliest = [tokenizer.convert_tokens_to_ids(answer.split()[-1]) for answer in plain]
    biased = LogitsSettings(logit_bias=tuple((token, -100.0) for token in set(likeliest)))
    found = answers(system, [policy], sums, temperature=0, logits=biased)
    assert found == answers(system, [1], sums, temperature=0, logits=biased)
    assert not set(found) & set(plain)


def test_two_prompts_are_penalised_by_the_references(hybrid_folder: Path) -> None:
    prompts = PromptPair(aligned=PromptSettings({"enable_thinking": False}))
    options: dict[str, Any] = {"temperature": 0, "logits": PENALISED}
    found = answers(f"prompts:{hybrid_folder}", [0], prompts=prompts, **options)
    plain = answers(f"model:{hybrid_folder}", [], **options)
    assert found == [answer.removeprefix("<think>") for answer in plain]
    assert answers(f"prompts:{hybrid_folder}", [0, 0.5, 1], prompts=prompts, **options)[
        1::3
    ] == answers(f"prompts:{hybrid_folder}", [0.5], prompts=prompts, **options)


def test_a_biased_token_must_be_in_the_vocabulary(tiny_pair: Any) -> None:
    outside = LogitsSettings(logit_bias=((99_999, 1.0),))
    with pytest.raises(ConfigError, match=r"logit_bias has the token id 99999; this model's are 0"):
        LocalBackend(
            parse_system(f"model:{tiny_pair.reference}"), [], SystemOptions(logits=outside)
        )
    model, tokenizer = load_model(tiny_pair.reference), load_tokenizer(tiny_pair.reference)
    with pytest.raises(ConfigError, match="logit_bias has the token id 99999"):
        generate_responses(model, tokenizer, ASKED, max_new_tokens=2, logits=outside)


def test_a_server_is_sent_what_has_an_effect(serve: Any) -> None:
    def reply(path: str, body: Any) -> Any:
        choice = {"message": {"content": "4"}, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 1}}

    server = serve(reply)
    settings = LogitsSettings(top_k=20, presence_penalty=0.5, logit_bias=((3, 1.0),))
    answers(f"url:{server.url}", [], model_name="m", logits=settings)
    body = server.asked[0][1]
    sent = {name: body[name] for name in ("top_k", "presence_penalty", "logit_bias")}
    assert sent == {"top_k": 20, "presence_penalty": 0.5, "logit_bias": {"3": 1.0}}
    assert not {"min_p", "repetition_penalty", "frequency_penalty"} & body.keys()
