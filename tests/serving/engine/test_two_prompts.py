"""Requests of one model under two prompts: each answer is the one that the library writes alone."""

from collections.abc import Callable
from typing import Any

import pytest

from flexalign.data.prompting import PromptSettings
from flexalign.generation import TwoPromptDecoder
from flexalign.generation.responses import generate_responses
from flexalign.lambdas import Adaptive, Fixed, Route, Schedule
from flexalign.models.prompted import PairRendering, PromptPair, TwoPrompts
from flexalign.serving.engine import Engine, Job, TwoPromptRunner

QUESTIONS = ["one and two", "1+2=", "the answer is six because one and two make three", "a"]
DIALS = [
    Fixed(0.0),
    Fixed(0.5),
    Fixed(1.0),
    Schedule("linear", start=0, end=1, steps=5),
    Schedule("thinking", think=0, answer=1),
    Adaptive(0.0),
    Adaptive(1.0),
    Adaptive(0.02, measure="min_token_probability"),
    Route(0.5),
]


@pytest.fixture(params=["longer aligned prompt", "longer reference's prompt"])
def decoder(request: pytest.FixtureRequest, tiny_model: Any, hybrid_tokenizer: Any) -> Any:
    told = PromptSettings({"enable_thinking": False}, "the answer is six.")
    prompts = PromptPair(PromptSettings(), told)
    if "reference" in request.param:
        prompts = PromptPair(told, PromptSettings())
    rendering = PairRendering(hybrid_tokenizer, prompts)
    return TwoPromptDecoder(tiny_model(initializer_range=0.15), rendering)


def job(both: TwoPrompts, dial: Any, number: int) -> Job:
    return Job(
        tuple(both.reference.ids),
        dial,
        max_tokens=3 + number % 9,
        temperature=number % 2,
        seed=number,
        aligned=tuple(both.aligned.ids),
    )


def test_each_answer_is_the_one_it_gets_alone(
    engine: Callable[..., Engine], write: Any, decoder: TwoPromptDecoder
) -> None:
    both = [decoder.rendering.both([{"role": "user", "content": one}]) for one in QUESTIONS]
    jobs = [job(both[n % 4], DIALS[n % len(DIALS)], n) for n in range(36)]
    answers = write(engine(TwoPromptRunner(decoder), rows=7, prefill_tokens=100), jobs)
    routes = set()
    for number, (asked, answer) in enumerate(zip(jobs, answers, strict=True)):
        [alone] = generate_responses(
            decoder, decoder.tokenizer, [both[number % 4]], max_new_tokens=asked.max_tokens,
            temperature=asked.temperature, seeds=[asked.seed],
            lam=[asked.dial if not isinstance(asked.dial, Route) else way(asked, answer)],
        )  # fmt: skip
        assert answer.ended.token_ids == alone.token_ids
        if not isinstance(asked.dial, Route):
            assert answer.ended.route == alone.route
        routes.add(answer.ended.route)
    assert routes == {None, "fast", "slow"}


def way(asked: Job, answer: Any) -> Fixed:
    """The λ of the way that a route policy drew."""
    assert answer.ended.lam == (1.0 if answer.ended.route == "fast" else 0.0)
    return Fixed(answer.ended.lam)
