"""A λ for each question in interpolated weights, held against first answers that are written by hand."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from flexalign.errors import ConfigError, LambdaError
from flexalign.generation.responses import generate_responses
from flexalign.lambdas import Ladder, Setting, parse_any_dial
from flexalign.models.loading import load_model, load_tokenizer
from flexalign.systems import PromptRequest, SystemOptions, local, open_backend, parse_system

ASKED = ["1 + 3 + 2 ?", "4 + 1 + 4 ?", "8 + 4 + 7 + 9 ?", "1 + 2 + 3 + 4 ?", "5 + 6 + 9 + 1 + 8 ?"]
THRESHOLDS, LAMBDAS = (0.17, 0.08), (2.0, 1.0, 0.0)
LADDER = Ladder(THRESHOLDS, LAMBDAS)


def written_by_hand(text: str, lam: float, steps: int = 90) -> tuple[list[int], list[float]]:
    """Write greedily with interpolated weights, no cache and no batch; return tokens and probabilities."""
    model, other = load_model("miniature:reference"), load_model("miniature:aligned")
    tokenizer = load_tokenizer("miniature:reference")
    ends = [{name: v.double() for name, v in one.state_dict().items()} for one in (model, other)]
    model.load_state_dict(
        {name: (1 - lam) * v + lam * ends[1][name] for name, v in ends[0].items()}
    )

    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ids: list[int] = list(prompt["input_ids"])
    tokens: list[int] = []
    probabilities: list[float] = []
    while len(tokens) < steps and (not tokens or tokens[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens])).logits[0, -1].double()
        tokens.append(int(logits.argmax()))
        probabilities.append(float(logits.softmax(-1)[tokens[-1]]))
    return tokens, probabilities


def asked_at(
    dial: object, *, samples: int = 1, asked: Sequence[str] = ASKED
) -> list[PromptRequest]:
    setting = Setting.of(dial)
    return [
        PromptRequest(
            place, [{"role": "user", "content": text}], setting, sample, 10 * place + sample
        )
        for place, text in enumerate(asked)
        for sample in range(samples)
    ]


def answered(
    requests: Sequence[PromptRequest], done: Sequence[Any] = (), **options: Any
) -> dict[Any, Any]:
    settings = list(dict.fromkeys(request.setting for request in requests))
    given = SystemOptions(**{"max_new_tokens": 90, "top_p": 1.0, "batch_size": 2} | options)
    backend = open_backend(parse_system("interpolate:miniature"), settings, given)
    pairs = [pair for block in backend.run(requests, done) for pair in block]
    assert len(pairs) == len({request.key for request, _ in pairs})
    return {(request.prompt, request.sample): answer for request, answer in pairs}


def test_each_question_is_answered_at_its_own_lambda() -> None:
    found = answered(asked_at(LADDER), temperature=1.0)
    fixed = {lam: answered(asked_at(lam), temperature=1.0) for lam in LAMBDAS[1:]}
    tokenizer = load_tokenizer("miniature:reference")

    chosen = []
    for place, text in enumerate(ASKED):
        tokens, probabilities = written_by_hand(text, LAMBDAS[0])
        assert tokens[-1] == tokenizer.eos_token_id
        so_far = torch.tensor(probabilities, dtype=torch.float64).cumprod(0).tolist()
        answer = found[place, 0]
        if so_far[-1] >= THRESHOLDS[0]:
            chosen.append(LAMBDAS[0])
            assert answer.text == tokenizer.decode(tokens[:-1])
            assert (answer.tokens, answer.rejected_tokens) == (len(tokens) - 1, 0)
            assert (answer.route, answer.confidence) == (
                "fast",
                pytest.approx(so_far[-1], rel=1e-4),
            )
            continue

        # Below all thresholds the first answer stops at the token that brings it there.
        is_low = [one < THRESHOLDS[1] for one in so_far]
        stop = is_low.index(True) if any(is_low) else len(tokens) - 1
        rejected = stop + 1 if tokens[stop] != tokenizer.eos_token_id else stop
        lam = LAMBDAS[2] if any(is_low) else LAMBDAS[1]
        chosen.append(lam)
        alone = fixed[lam][place, 0]
        assert answer.text == alone.text
        assert (answer.tokens, answer.rejected_tokens) == (alone.tokens + rejected, rejected)
        assert (answer.route, answer.confidence) == ("slow", pytest.approx(so_far[stop], rel=1e-4))
        assert answer.thinking_tokens == alone.thinking_tokens
    assert chosen == [2.0, 2.0, 1.0, 1.0, 0.0]


def test_the_smallest_probability_is_a_measure_too() -> None:
    least = [min(written_by_hand(text, 2.0)[1]) for text in ASKED[:2]]
    middle = sum(least) / 2
    ladder = Ladder((middle,), (2.0, 0.0), "min_token_probability")
    found = answered(asked_at(ladder, asked=ASKED[:2]))
    kept = [found[place, 0].route == "fast" for place in (0, 1)]
    assert kept == [one >= middle for one in least]
    assert sorted(kept) == [False, True]


def test_a_first_answer_that_is_cut_off_is_rejected_for_the_last_lambda() -> None:
    ladder, asked = Ladder((0.0,), (2.0, 0.0)), ASKED[:2]
    found = answered(asked_at(ladder, asked=asked), max_new_tokens=12)
    fixed = answered(asked_at(0.0, asked=asked), max_new_tokens=12)
    for place, answer in found.items():
        assert answer.text == fixed[place].text
        assert (answer.route, answer.rejected_tokens, answer.tokens) == ("slow", 12, 24)
        assert answer.truncated


def test_samples_share_the_first_answer_and_agreement_is_counted() -> None:
    ladder = Ladder((0.5,), (2.0, 1.0), "agreement", samples=2)
    found = answered(asked_at(ladder, samples=3, asked=ASKED[:3]), temperature=1.0, batch_size=4)
    assert len(found) == 9
    for place in range(3):
        own = [found[place, sample] for sample in range(3)]
        assert (
            len({answer.confidence for answer in own}) == len({answer.route for answer in own}) == 1
        )
        assert own[0].confidence in (0.0, 0.5, 1.0)
        assert all(answer.rejected_tokens > 40 for answer in own)
        texts = {answer.text for answer in own}
        assert len(texts) == 1 if own[0].route == "fast" else len(texts) > 1


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped() -> None:
    requests = asked_at(LADDER, samples=2)
    whole = answered(requests, temperature=1.0)
    for kept in ([0, 3, 4, 9], range(8)):
        done = [requests[place].key for place in kept]
        rest = answered(requests, done, temperature=1.0)
        places = [(one.prompt, one.sample) for one in requests if one.key not in done]
        assert rest == {place: whole[place] for place in places}
    assert answered(requests, [request.key for request in requests]) == {}


def test_one_model_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    alive: list[int] = []

    def load(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        alive.append(sum(one() is not None for one in loaded))
        model = load_model(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(local, "load_model", load)
    answered(asked_at(LADDER))
    assert alive == [0, 0, 0]  # one for each λ
    answered([*asked_at(1.0, asked=ASKED[:1]), *asked_at(0.0, asked=ASKED[:1])])
    assert alive == [0] * 5


@pytest.mark.parametrize(
    "name",
    [
        "model:miniature",
        "pair:miniature",
        "dial:miniature,miniature:fast",
        "dial:miniature,miniature:dial",
        "url:http://localhost:1/v1",
    ],
)
def test_all_other_systems_refuse_a_ladder(name: str) -> None:
    message = rf"{name}.*: ladder 0.9,0.6 .* interpolate:REF,ALIGNED alone"
    with pytest.raises(ConfigError, match=message):
        open_backend(parse_system(name), [Setting.of("ladder 0.9,0.6")])


def test_vllm_and_lambdas_outside_the_range_are_refused() -> None:
    system, ladder = parse_system("interpolate:miniature"), Setting.of(Ladder((0.5,), (1.0, -0.5)))
    with pytest.raises(LambdaError, match=r"ladder 0.5 lambdas=1,-0.5.*--lambda-range"):
        open_backend(system, [ladder])
    open_backend(system, [ladder], SystemOptions(lambda_range=(-1.0, 2.0)))
    with pytest.raises(ConfigError, match="--engine vllm runs plain models"):
        open_backend(system, [Setting.of(LADDER)], SystemOptions(engine="vllm"))


def test_generate_has_one_model_and_refuses_a_ladder() -> None:
    model, tokenizer = load_model("miniature:reference"), load_tokenizer("miniature:reference")
    for dial in (LADDER, LADDER.to_json()):
        with pytest.raises(ConfigError, match="weights of its own"):
            generate_responses(model, tokenizer, ["3+4?"], max_new_tokens=4, policy=dial)
    assert parse_any_dial(LADDER.to_json()) == LADDER
