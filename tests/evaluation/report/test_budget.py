import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexalign.errors import DataError
from flexalign.evaluation.report.budget import (
    budget_caps,
    hard_budget,
    score_by_budget,
    split_gain,
)
from flexalign.evaluation.samples import Samples


def _scored(rows: list[tuple[str, int, str]]) -> Samples:
    questions, tokens, statuses = zip(*rows, strict=True)
    return Samples(questions, np.array(statuses) == "correct", tokens, status=statuses)


REFERENCE = _scored(
    [
        ("a", 10, "correct"),
        ("a", 40, "correct"),
        ("b", 50, "truncated"),
        ("b", 20, "wrong"),
    ]
)
SAMPLES = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(1, 60),
        st.sampled_from(["correct", "wrong", "truncated"]),
    ),
    min_size=1,
    max_size=20,
)


def test_every_cap_by_hand():
    curve = score_by_budget(REFERENCE, (5, 10, 20, 40, 50))
    assert [part.mean for part in curve.accuracy] == [0, 0.25, 0.25, 0.5, 0.5]
    assert curve.answered == (0, 0.25, 0.5, 0.75, 0.75)
    assert curve.tokens == (5, 10, 17.5, 27.5, 30)
    assert curve.among_answered(0) is None
    assert curve.among_answered(3) == pytest.approx(2 / 3)


def test_last_cap_is_the_sweeps_own_figure_and_a_boxed_cut_response_counts():
    ran_on = _scored([("a", 50, "correct"), ("a", 50, "truncated")])
    curve = score_by_budget(ran_on, (49, 50))
    assert [part.mean for part in curve.accuracy] == [0, 0.5]
    assert curve.answered == (0, 0.5)


@given(SAMPLES, SAMPLES)
def test_gain_is_the_sum_of_its_parts(first, second):
    caps = (1, 5, 20, 60)
    one, two = (score_by_budget(_scored(rows), caps) for rows in (first, second))
    for index, part in enumerate(split_gain(one, two)):
        gain = one.accuracy[index].mean - two.accuracy[index].mean
        assert part.no_longer_cut + part.better_answers == pytest.approx(gain, abs=1e-12)


def test_same_answers_sooner_are_only_no_longer_cut():
    slow = _scored([("a", 40, "correct"), ("b", 10, "wrong"), ("b", 60, "correct")])
    fast = _scored([("a", 4, "correct"), ("b", 1, "wrong"), ("b", 6, "correct")])
    caps = (6, 60)
    parts = split_gain(score_by_budget(fast, caps), score_by_budget(slow, caps))
    assert parts[0].no_longer_cut == pytest.approx(2 / 3)
    assert (parts[1].no_longer_cut, parts[1].better_answers) == (0, 0)


def test_split_needs_equal_caps():
    with pytest.raises(DataError, match="different caps"):
        split_gain(score_by_budget(REFERENCE, (1,)), score_by_budget(REFERENCE, (2,)))


def test_hard_budget_spends_no_more_and_the_next_cap_would():
    setting = _scored([("a", 12, "correct"), ("b", 25, "correct")])
    budget = hard_budget(setting, REFERENCE)
    assert budget is not None
    naive = [cap for cap in range(1, 51) if np.minimum(REFERENCE.tokens, cap).mean() <= 18.5]
    assert budget.cap == naive[-1] == 22
    assert budget.tokens == 18.5
    assert budget.accuracy == 0.25
    assert budget.advantage.mean == pytest.approx(0.75)


@pytest.mark.parametrize(
    "rows",
    [[("a", 99, "correct"), ("b", 99, "wrong")], [("a", 2, "correct"), ("z", 2, "wrong")]],
    ids=["not shorter", "other questions"],
)
def test_no_hard_budget(rows):
    assert hard_budget(_scored(rows), REFERENCE) is None


@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_caps_rise_to_the_longest(longest, shortest):
    caps = budget_caps(longest, shortest)
    assert caps[-1] == longest
    assert list(caps) == sorted(set(caps))
    assert caps[0] >= 1
