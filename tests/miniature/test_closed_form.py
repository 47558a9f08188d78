"""The closed forms against brute-force enumeration of every trace of a short world."""

import dataclasses
import itertools
import math
import random

import pytest

from flexalign.errors import ConfigError
from flexalign.miniature import closed_form
from flexalign.miniature.closed_form import (
    expected_outcome,
    sequence_level,
    sequence_level_outcome,
    token_level,
)
from flexalign.miniature.world import ALIGNED, REFERENCE, Habits, sample_question, sample_trace

# Passes are rare here, so that enumeration may stop after a few of them.
RARE_REFERENCE = Habits(error=0.3, check=0.8, again=0.03, catch=0.6, quit=0.05)
RARE_ALIGNED = Habits(error=0.2, check=0.7, again=0.02, catch=0.6, quit=0.08)
MOST_PASSES = 6


def enumerate_line():
    """All ways to write one line: (events, deviation, passes). An event is (habit, happened)."""
    for wrong in (0, -1, 1):
        start = [("error", wrong != 0)] + ([("side", True)] if wrong else [])
        yield [*start, ("check", False)], wrong, 0
        for passes in range(1, MOST_PASSES + 1):
            loop = [("check", True)] + [("again", True)] * (passes - 1) + [("again", False)]
            if not wrong:
                yield start + loop, 0, passes
                continue
            for mended_at in range(1, passes + 1):
                catches = [("catch", False)] * (mended_at - 1) + [("catch", True)]
                yield start + loop + catches, 0, passes
            yield start + loop + [("catch", False)] * passes, wrong, passes


def enumerate_traces(terms):
    """All traces of a question: (events, right, tokens)."""
    for count in range(1, len(terms)):
        quits = [("quit", False)] * (count - 1)
        if count < len(terms) - 1:
            quits.append(("quit", True))
        missing = sum(terms[count + 1 :])
        for lines in itertools.product(list(enumerate_line()), repeat=count):
            events = quits + [event for line in lines for event in line[0]]
            tokens = 3 + sum(7 + 6 * line[2] for line in lines)
            yield events, sum(line[1] for line in lines) == missing, tokens


def probability(events, habits):
    chances = {"side": 0.5, **vars(habits)}
    return math.prod(chances[name] if yes else 1 - chances[name] for name, yes in events)


@pytest.fixture
def short_world(monkeypatch):
    """Only questions of three numbers, so that two lines are all there is."""
    monkeypatch.setattr(closed_form, "TERMS", (3,))
    return [
        (2, 1, third) for third in range(1, 10)
    ]  # accuracy depends on the numbers left out alone, tokens on none


def test_expected_outcome_is_the_sum_over_all_traces(short_world):
    habits = RARE_REFERENCE
    accuracy = tokens = mass = 0.0
    for terms in short_world:
        for events, right, length in enumerate_traces(terms):
            share = probability(events, habits) / len(short_world)
            mass, accuracy, tokens = mass + share, accuracy + share * right, tokens + share * length
    outcome = expected_outcome(habits)
    assert mass == pytest.approx(1, abs=1e-7)
    assert outcome.accuracy == pytest.approx(accuracy, abs=1e-7)
    assert outcome.tokens == pytest.approx(tokens, abs=1e-5)


@pytest.mark.parametrize(
    ("lam", "gate"),
    [(lam, None) for lam in (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)] + [(3.0, 0.02), (3.0, 0.05)],
)
def test_sequence_level_is_the_normalised_product_over_all_traces(short_world, lam, gate):
    used = {
        name: 1.0 if gate is not None and abs(low - getattr(RARE_ALIGNED, name)) <= gate else lam
        for name, low in vars(RARE_REFERENCE).items()
    } | {"side": 1.0}

    def weigh(events):
        sides = [{"side": 0.5, **vars(habits)} for habits in (RARE_REFERENCE, RARE_ALIGNED)]
        return math.prod(
            (low if yes else 1 - low) ** (1 - used[name])
            * (high if yes else 1 - high) ** used[name]
            for name, yes in events
            for low, high in [[side[name] for side in sides]]
        )

    mass = accuracy = tokens = 0.0
    happened: dict[str, float] = {}
    decided: dict[str, float] = {}
    for terms in short_world:
        traces = list(enumerate_traces(terms))
        weights = [weigh(events) for events, _, _ in traces]
        partition = sum(weights)
        for weight, (events, right, length) in zip(weights, traces, strict=True):
            share = weight / partition / len(short_world)
            mass, accuracy, tokens = mass + share, accuracy + share * right, tokens + share * length
            for name, yes in events:
                happened[name] = happened.get(name, 0) + share * yes
                decided[name] = decided.get(name, 0) + share
    habits, quit_by_lines = sequence_level(RARE_REFERENCE, RARE_ALIGNED, lam, gate)
    for name in ("error", "check", "again", "catch"):
        assert getattr(habits, name) == pytest.approx(happened[name] / decided[name], rel=1e-5)
    assert quit_by_lines[0] == pytest.approx(happened["quit"] / decided["quit"], rel=1e-5)
    outcome = sequence_level_outcome(RARE_REFERENCE, RARE_ALIGNED, lam, gate)
    assert outcome.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert outcome.tokens == pytest.approx(tokens, abs=1e-4)


def test_quit_at_the_sequence_level_in_longer_questions(monkeypatch):
    """Four numbers: the chance to give up depends on how many lines are still to come."""
    monkeypatch.setattr(closed_form, "TERMS", (4,))
    monkeypatch.setitem(globals(), "MOST_PASSES", 2)
    lam, by_place = 2.0, [0.0, 0.0]
    reached = [0.0, 0.0]
    rare = [
        Habits(error=h.error, check=h.check, again=1e-9, catch=0.6, quit=h.quit)
        for h in (RARE_REFERENCE, RARE_ALIGNED)
    ]
    for events, _, _ in enumerate_traces((1, 1, 1, 1)):
        weight = probability(events, rare[0]) ** (1 - lam) * probability(events, rare[1]) ** lam
        for place, (_, yes) in enumerate(event for event in events if event[0] == "quit"):
            by_place[place] += weight * yes
            reached[place] += weight
    _, quit_by_lines = sequence_level(*rare, lam)
    measured = [yes / all_ for yes, all_ in zip(by_place, reached, strict=True)]
    assert measured == pytest.approx(quit_by_lines[::-1], rel=1e-6)


@pytest.mark.parametrize("habits", [REFERENCE, ALIGNED])
def test_expected_outcome_agrees_with_simulation(habits):
    rng = random.Random(0)
    questions = [sample_question(rng) for _ in range(20_000)]
    traces = [sample_trace(question, habits, rng) for question in questions]
    accuracy = sum(t[-1] == str(q.answer) for q, t in zip(questions, traces, strict=True)) / 20_000
    tokens = sum(map(len, traces)) / 20_000
    outcome = expected_outcome(habits)
    assert outcome.accuracy == pytest.approx(accuracy, abs=0.012)  # 4 standard errors
    assert outcome.tokens == pytest.approx(tokens, rel=0.015)


def test_token_level_ends_are_the_two_models_and_logits_are_linear_between():
    assert vars(token_level(REFERENCE, ALIGNED, 0)) == pytest.approx(vars(REFERENCE))
    assert vars(token_level(REFERENCE, ALIGNED, 1)) == pytest.approx(vars(ALIGNED))
    again = token_level(REFERENCE, ALIGNED, 2).again
    low, high = REFERENCE.again, ALIGNED.again
    assert again / (1 - again) == pytest.approx((high / (1 - high)) ** 2 / (low / (1 - low)))


def test_gate_keeps_habits_that_hardly_differ_at_the_aligned_model():
    gated = token_level(REFERENCE, ALIGNED, 5, gate=0.01)
    free = token_level(REFERENCE, ALIGNED, 5)
    assert (gated.again, gated.error) == (free.again, free.error)
    assert gated.check == pytest.approx(ALIGNED.check)
    assert gated.quit == pytest.approx(ALIGNED.quit)


def test_no_sequence_level_optimum_where_longer_traces_weigh_ever_more():
    with pytest.raises(ConfigError, match="ever longer traces"):
        sequence_level(REFERENCE, ALIGNED, -2)


def test_the_world_rises_and_falls_with_lambda_and_has_headroom_below_zero():
    """What the world was chosen for: the shape of the paper's Table 1, and of λ<0 in Table 9."""
    at = {
        lam: expected_outcome(token_level(REFERENCE, ALIGNED, lam)) for lam in (-1, 0, 1, 2, 5, 10)
    }
    assert at[-1].accuracy > at[0].accuracy + 0.01
    assert at[0].accuracy < at[1].accuracy < at[2].accuracy
    assert at[2].accuracy > at[5].accuracy > at[10].accuracy
    assert at[10].accuracy < at[0].accuracy
    cut = {lam: 1 - outcome.tokens / at[0].tokens for lam, outcome in at.items()}
    assert cut[2] > 1.5 * cut[1]


def test_two_models_that_catch_errors_unlike_have_no_closed_form():
    other = dataclasses.replace(ALIGNED, catch=REFERENCE.catch / 2)
    with pytest.raises(ConfigError, match="the same `catch` in both models"):
        sequence_level(REFERENCE, other, 1.0)
