"""Answers of the engine: whatever else runs, each is the one that the library writes alone."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from contract.subjects import make_base
from flexalign.data.logits import LogitsSettings
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, ServingError, UnsupportedModelError
from flexalign.generation.responses import generate_responses
from flexalign.inra import InRaModel
from flexalign.lambdas import Adaptive, Fixed, Route, Schedule
from flexalign.serving.engine import AnswerPiece, Engine, Generation, InRaRunner, Job, scheduler
from flexalign.serving.engine.batch import Batch, PlainRunner
from flexalign.serving.engine.scheduler import TokenRate

PROMPTS = ["one and two", "1+2=", "the answer is six because one and two make three and three", "a"]
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


def jobs_for(tokenizer: Any, count: int) -> list[Job]:
    return [
        Job(
            tuple(tokenizer(PROMPTS[number % 4])["input_ids"]),
            DIALS[number % len(DIALS)],
            max_tokens=3 + number % 9,
            temperature=number % 2,
            top_p=0.9 if number % 3 else 1.0,
            seed=number,
        )
        for number in range(count)
    ]


def test_each_answer_is_the_one_it_gets_alone(
    engine: Callable[..., Engine], write: Any, dial: InRaModel, tiny_tokenizer: Any
):
    [greedy] = generate_responses(
        dial, tiny_tokenizer, PROMPTS[:1], max_new_tokens=3, temperature=0, lam=[1.0]
    )
    end = greedy.token_ids[2]
    jobs = jobs_for(tiny_tokenizer, 36)
    answers = write(engine(ends=[end], rows=7, prefill_tokens=40), jobs)
    routes = set()
    for number, (job, answer) in enumerate(zip(jobs, answers, strict=True)):
        asked = job.dial
        if isinstance(asked, Route):
            assert answer.ended.route is not None
            asked = Fixed(1.0 if answer.ended.route == "fast" else 0.0)
            routes.add(answer.ended.route)
        [expected] = generate_responses(
            dial,
            tiny_tokenizer,
            [PROMPTS[number % 4]],
            max_new_tokens=job.max_tokens,
            temperature=job.temperature,
            top_p=job.top_p,
            seeds=[job.seed],
            lam=[asked],
            eos_token_id=[tiny_tokenizer.eos_token_id, end],
        )
        assert answer.ended.token_ids == expected.token_ids
        assert answer.text == expected.text
        assert answer.ended.rejected_tokens == expected.rejected_tokens
        assert (answer.ended.finish == "length") == expected.truncated
        assert [one.token for one in answer.tokens] == list(expected.token_ids)
        if isinstance(asked, Adaptive):
            assert answer.ended.route == expected.route
            assert answer.ended.confidence == pytest.approx(expected.confidence, rel=1e-3)
            assert answer.ended.lam == (1.0 if expected.route == "fast" else 0.0)
            routes.add(expected.route)
    assert routes == {"fast", "slow"}
    assert {answer.ended.finish for answer in answers} == {"stop", "length"}


def test_a_fast_answer_is_shown_to_nobody_until_it_is_accepted(
    engine: Callable[..., Engine], write: Any, tiny_tokenizer: Any
):
    """A slow answer comes in pieces, none of them the rejected one's; a fast one comes whole."""
    end = tiny_tokenizer("e")["input_ids"][0]
    prompt = tuple(tiny_tokenizer("the answer")["input_ids"])
    jobs = [Job(prompt, dial, 20, temperature=0) for dial in (Adaptive(1.0), Fixed(0.0))]
    slow, plain = write(engine(ends=[end]), jobs)
    assert slow.ended.route == "slow"
    assert slow.text == plain.text
    assert slow.pieces > 1


LIMITED = [
    LogitsSettings(repetition_penalty=1.3, logit_bias=((9, 4.0), (12, -100.0))),
    LogitsSettings(top_k=3, min_p=0.2, frequency_penalty=0.6),
    LogitsSettings(presence_penalty=1.5),
]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_limits_and_penalties_are_those_of_the_library(
    engine: Callable[..., Engine],
    write: Any,
    dial: InRaModel,
    tiny_tokenizer: Any,
    temperature: float,
):
    dials = [Fixed(0.0), Fixed(0.5), Adaptive(1.0)]
    jobs = [
        Job(
            tuple(tiny_tokenizer(PROMPTS[number])["input_ids"]),
            dials[number],
            max_tokens=12,
            temperature=temperature,
            top_p=0.95,
            seed=number,
            logits=LIMITED[number],
        )
        for number in range(3)
    ]
    for number, answer in enumerate(write(engine(), jobs)):
        asked: dict[str, Any] = {
            "max_new_tokens": 12,
            "temperature": temperature,
            "top_p": 0.95,
            "seeds": [number],
            "lam": [dials[number]],
        }
        [expected] = generate_responses(
            dial, tiny_tokenizer, [PROMPTS[number]], logits=LIMITED[number], **asked
        )
        [plain] = generate_responses(dial, tiny_tokenizer, [PROMPTS[number]], **asked)
        assert answer.ended.token_ids == expected.token_ids != plain.token_ids


def test_greedy_penalties_are_those_of_transformers_generate(
    engine: Callable[..., Engine], write: Any, dial: InRaModel, tiny_tokenizer: Any
):
    for prompt in PROMPTS:
        inputs = tiny_tokenizer(prompt, return_tensors="pt")
        job = Job(
            tuple(inputs["input_ids"][0].tolist()),
            Fixed(0.5),
            max_tokens=12,
            temperature=0,
            logits=LIMITED[0],
        )
        [answer] = write(engine(), [job])
        expected = dial.generate(
            **inputs,
            lam=0.5,
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.3,
            sequence_bias={(9,): 4.0, (12,): -100.0},
        )
        written = expected[0, len(job.prompt) :].tolist()
        assert list(answer.ended.token_ids) == written[: len(answer.ended.token_ids)]
        assert len(written) - len(answer.ended.token_ids) <= 1  # the end token


def test_log_probabilities_are_the_models_own(
    engine: Callable[..., Engine], write: Any, dial: InRaModel, tiny_tokenizer: Any
):
    prompt = tuple(tiny_tokenizer("1+2=")["input_ids"])
    job = Job(prompt, Fixed(0.5), 6, temperature=1, seed=3, logprobs=2)
    [answer] = write(engine(), [job])
    with torch.no_grad():
        ids = torch.tensor([prompt + answer.ended.token_ids])
        log_probs = dial(ids, lam=0.5).logits[0].double().log_softmax(-1)
    for place, token in enumerate(answer.tokens):
        own = log_probs[len(prompt) - 1 + place]
        assert token.logprob == pytest.approx(float(own[token.token]), abs=1e-4)
        top = own.topk(2)
        assert [one for one, _ in token.likeliest] == top.indices.tolist()
        assert [one for _, one in token.likeliest] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_a_stop_text_ends_the_answer_before_it(
    engine: Callable[..., Engine], write: Any, tiny_tokenizer: Any
):
    prompt = tuple(tiny_tokenizer("1+2=")["input_ids"])
    started = engine()
    [whole] = write(started, [Job(prompt, Fixed(1.0), 12, temperature=0)])
    stop = whole.text[4:6]
    [cut] = write(started, [Job(prompt, Fixed(1.0), 12, temperature=0, stop=(stop,))])
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert cut.ended.finish == "stop"
    assert len(cut.ended.token_ids) < len(whole.ended.token_ids)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_who_leaves_makes_room_within_one_step(engine: Callable[..., Engine], tiny_tokenizer: Any):
    started = engine(rows=1)
    prompt = tuple(tiny_tokenizer("1+2=")["input_ids"])
    endless = Job(prompt, Fixed(0.5), 400, temperature=0)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        first, second, third = started.submit(
            [endless, endless, replace(endless, max_tokens=3)], loop
        )
        pieces = first.pieces()
        await anext(pieces)
        assert (started.running, started.waiting) == (1, 2)
        second.cancel()  # while it waits
        assert (await anext(second.pieces())).ended.finish == "cancelled"
        before = started.tokens_written
        first.cancel()
        async for piece in pieces:
            last = piece
        assert last.ended.finish == "cancelled"
        # Its own tokens, all that were written before: the step under way, and the next one's.
        assert len(last.ended.token_ids) - before <= 3
        assert (await last_piece(third)).ended.finish == "length"

    asyncio.run(run())
    until(lambda: started.running + started.waiting == 0)


class CancelledMeanwhile(Generation):
    """Is cancelled just after the engine has asked for the first time whether it is."""

    is_asked = False

    @property
    def is_cancelled(self) -> bool:
        is_cancelled, self.is_asked = self.is_asked, True
        return is_cancelled

    @is_cancelled.setter
    def is_cancelled(self, value: bool) -> None:
        assert not value


def test_who_leaves_while_the_queue_is_read_is_not_lost(
    engine: Callable[..., Engine], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scheduler, "Generation", CancelledMeanwhile)
    prompt = tuple(tiny_tokenizer("1+2=")["input_ids"])
    started = engine(rows=1)

    async def run() -> None:
        (one,) = started.submit([Job(prompt, Fixed(0.5), 400)], asyncio.get_running_loop())
        last = await asyncio.wait_for(last_piece(one), timeout=60)
        assert last.ended.finish == "cancelled"

    asyncio.run(run())


async def last_piece(generation: Generation) -> AnswerPiece:
    return [piece async for piece in generation.pieces()][-1]


class Choosy(InRaRunner):
    """Fails at some prompts."""

    def prefill(self, ids: Any, mask: Any, phases: Any) -> Any:
        if int(ids.max()) > 300:
            raise RuntimeError("out of memory")
        return super().prefill(ids, mask, phases)


def test_a_prompt_that_cannot_be_prefilled_fails_alone(
    engine: Callable[..., Engine], dial: InRaModel, caplog: pytest.LogCaptureFixture
):
    runner = Choosy(dial)
    good, bad = (Job((5, token, 6), Fixed(0.5), 4, temperature=0) for token in (7, 310))
    started = engine(runner)

    async def run() -> list[Any]:
        generations = started.submit([good, bad, good], asyncio.get_running_loop())
        return await asyncio.gather(*map(last_piece, generations), return_exceptions=True)

    first, second, third = asyncio.run(run())
    assert first.ended.token_ids == third.ended.token_ids
    assert isinstance(second, RuntimeError)
    assert "prefilled" in caplog.text


def test_a_prompt_that_fails_with_nobody_beside_it_leaves_the_engine_running(
    engine: Callable[..., Engine], write: Any, dial: InRaModel
):
    started = engine(Choosy(dial))
    for token, fails in ((310, True), (7, False)):
        [answer] = write(started, [Job((5, token, 6), Fixed(0.5), 4, temperature=0)])
        assert isinstance(answer, RuntimeError) == fails


class Failing(InRaRunner):
    """Its next steps fail, as often as it is told."""

    failures = 0
    error: BaseException = RuntimeError("a step broke")

    def step(self, *given: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise self.error
        return super().step(*given)


def test_a_broken_step_fails_its_answers_and_the_next_are_served(
    engine: Callable[..., Engine], write: Any, dial: InRaModel, caplog: pytest.LogCaptureFixture
):
    runner = Failing(dial)
    started = engine(runner)
    job = Job((5, 6, 7), Fixed(0.5), 4, temperature=0)
    runner.failures = 1
    [failed] = write(started, [job])
    assert isinstance(failed, RuntimeError)
    [served] = write(started, [job])
    assert served.ended.finish == "length"
    assert "step failed" in caplog.text


@pytest.mark.parametrize(
    ("failures", "error"),
    [(10**9, RuntimeError("device lost")), (1, SystemExit("out of the step"))],
    ids=["every step fails", "one that escapes"],
)
def test_when_the_model_works_no_more_everybody_is_told_and_the_engine_ends(
    engine: Callable[..., Engine],
    dial: InRaModel,
    caplog: pytest.LogCaptureFixture,
    failures: int,
    error: BaseException,
):
    runner = Failing(dial)
    runner.error = error
    started = engine(runner, rows=2)
    endless = Job((5, 6, 7), Fixed(0.5), 400, temperature=0)

    async def run() -> list[Any]:
        loop = asyncio.get_running_loop()
        generations = started.submit([endless] * 5, loop)
        pieces = [generation.pieces() for generation in generations]
        await anext(pieces[0])
        runner.failures = failures

        async def rest(own: Any) -> None:
            async for _ in own:
                pass

        told = await asyncio.gather(*map(rest, pieces), return_exceptions=True)
        with pytest.raises(ServingError, match="restart"):
            started.submit([endless], loop)
        return told

    told = asyncio.run(run())
    assert not started.is_alive
    assert all(isinstance(one, ServingError) for one in told)
    assert all("restarted" in str(one) for one in told)
    assert "the engine has failed" in caplog.text


def test_what_it_cannot_serve_is_refused(engine: Callable[..., Engine], tiny_tokenizer: Any):
    started = engine(queue=2)
    for served in DIALS:
        started.check(served)
    assert started.has_room(2)
    assert not started.has_room(3)
    with pytest.raises(ConfigError, match="rows must be"):
        engine(rows=0)


def test_thinking_that_cannot_be_seen_in_tokens_is_no_dial(dial: InRaModel, tiny_tokenizer: Any):
    tags = ThinkingTags("<reasoning>", "</reasoning>")
    started = Engine(InRaRunner(dial), tiny_tokenizer, tags, [])
    started.check(Schedule("linear", start=0, end=1, steps=5))
    with pytest.raises(ConfigError, match=r"<reasoning>.*token"):
        started.check(Schedule("thinking", think=0, answer=1))


def test_a_recurrent_model_is_refused_before_it_is_served() -> None:
    with pytest.raises(UnsupportedModelError, match=r"this mamba keeps a .*no recurrent ones"):
        PlainRunner(make_base("mamba"))


def test_the_rate_is_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("flexalign.serving.engine.scheduler.time.monotonic", lambda: now[0])
    rate = TokenRate()
    rate.add(30)
    now[0] += 6
    rate.add(10)
    assert (rate.per_second, rate.total) == (4.0, 40)
    now[0] += 6
    assert (rate.per_second, rate.total) == (1.0, 40)


def test_what_is_under_way_when_it_stops_is_told(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    started = engine()
    step, steps = Batch.step, []

    def waits(self: Batch, *args: Any, **kwargs: Any) -> Any:
        # After a few tokens the answer waits for the stop: on a busy machine it had ended before.
        steps.append(self)
        while len(steps) > 5 and not started._is_stopping:
            time.sleep(0.001)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Batch, "step", waits)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        [generation] = started.submit([Job((5, 6, 7), Fixed(0.5), 400)], loop)
        await anext(generation.pieces())
        await asyncio.to_thread(started.stop)
        with pytest.raises(ServingError, match="shutting down"):
            async for _ in generation.pieces():
                pass
        assert not started.is_alive
        with pytest.raises(ServingError, match="stopped"):
            started.submit([Job((5,), None, 1)], loop)

    asyncio.run(run())
