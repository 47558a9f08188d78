import random

import pytest

from flexalign.miniature import make_questions, make_traces
from flexalign.miniature.world import (
    ALIGNED,
    REFERENCE,
    Habits,
    Question,
    branches,
    sample_question,
    sample_trace,
)


def test_a_trace_without_bad_habits_is_the_plain_sum():
    perfect = Habits(error=0, check=0, again=0, catch=1, quit=0)
    trace = sample_trace(Question((3, 8, 5)), perfect, random.Random(0))
    assert " ".join(trace) == "<think> #1 3 + 8 = 11 ; #2 11 + 5 = 16 ; </think> 16"


def test_an_error_that_no_pass_mends_is_carried_on():
    careless = Habits(error=1, check=1, again=0, catch=0, quit=0)
    trace = sample_trace(Question((3, 8, 5)), careless, random.Random(0))
    first, second = int(trace[6]), int(trace[-1])
    assert abs(first - 11) == 1
    assert trace[7:13] == ["check", "3", "+", "8", "=", str(first)]
    assert abs(second - (first + 5)) == 1


def test_branches_find_every_decision():
    text = "<think> #1 3 + 8 = 10 check 3 + 8 = 10 again 3 + 8 = 11 ; #2 11 + 5 = 16 ; </think> 16"
    found = list(branches(Question((3, 8, 5)), text.split()))
    assert [(b.habit, b.happened) for b in found] == [
        ("error", True),
        ("check", True),
        ("catch", False),
        ("again", True),
        ("catch", True),
        ("again", False),
        ("quit", False),
        ("error", False),
        ("check", False),
    ]
    tokens = text.split()
    assert all(tokens[b.position] in (b.event if b.happened else [b.otherwise]) for b in found)
    assert found[0].distribution(REFERENCE) == {"11": 0.65, "10": 0.175, "12": 0.175}
    assert found[3].distribution(ALIGNED) == pytest.approx({"again": 0.55, ";": 0.45})


@pytest.mark.parametrize("habits", [REFERENCE, ALIGNED])
def test_counted_branches_recover_the_habits(habits):
    rng = random.Random(1)
    counts: dict[str, list[bool]] = {}
    for _ in range(8000):
        question = sample_question(rng)
        for branch in branches(question, sample_trace(question, habits, rng)):
            counts.setdefault(branch.habit, []).append(branch.happened)
    for habit, happened in counts.items():
        expected = getattr(habits, habit)
        error = (expected * (1 - expected) / len(happened)) ** 0.5
        assert sum(happened) / len(happened) == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ("", 0),
        ("3 + 8", 0),
        ("<think> #1 3 + 8 =", 0),
        ("<think> #1 3 + 8 = ;", 0),
        ("<think> #1 3 + 8 = 11 again", 1),
        ("<think> #1 3 + 8 = 11 ; #2 12 + 5 = 17", 3),
    ],
)
def test_branches_stop_where_a_trace_leaves_the_grammar(trace, expected):
    found = list(branches(Question((3, 8, 5)), trace.split()))
    assert len(found) == expected


def test_rows_are_reproducible_and_differ_by_seed():
    assert make_traces(5, seed=1) == make_traces(5, seed=1) != make_traces(5, seed=2)
    assert make_questions(5, seed=1) != make_questions(5, seed=2)
