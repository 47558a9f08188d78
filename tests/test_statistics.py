import math
from fractions import Fraction

import numpy as np
import pytest

from flexalign.errors import ConfigError, DataError
from flexalign.statistics import (
    Interval,
    clustered_interval,
    equivalent,
    paired_difference_interval,
    paired_ratio_interval,
    simultaneous_confidence,
    simultaneous_interval,
    t_quantile,
)

REPEATS = 1500


def _coverage(intervals: list[Interval], truth: float) -> float:
    return sum(low <= truth <= high for low, _, high in intervals) / len(intervals)


@pytest.mark.parametrize(
    ("confidence", "freedom", "quantile"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.95, 9, 2.2622),
        (0.99, 10, 3.1693),
        (0.9, 30, 1.6973),
    ],
)
def test_t_quantiles_agree_with_the_printed_tables(
    confidence: float, freedom: int, quantile: float
) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(quantile, abs=6e-5)


def test_a_mean_with_one_sample_per_question_is_students_interval() -> None:
    values = [3.0, 5.0, 10.0, 2.0]
    half = 3.182446305 * np.std(values, ddof=1) / 2
    assert clustered_interval(values, "abcd") == pytest.approx((5 - half, 5, 5 + half))


def test_repeating_every_sample_adds_no_certainty() -> None:
    values, questions = [1.0, 4.0, 2.5, 7.0], [0, 1, 2, 3]
    once = clustered_interval(values, questions)
    assert clustered_interval(values * 8, questions * 8) == pytest.approx(once)
    yes = [1, 0, 1, 1]
    assert clustered_interval(yes * 8, questions * 8) == pytest.approx(
        clustered_interval(yes, questions)
    )


def test_one_sample_per_question_is_wilsons_interval_for_many_questions() -> None:
    n, p, z = 4000, Fraction(3, 4), 1.959964
    low, mean, high = clustered_interval([1, 1, 1, 0] * (n // 4), range(n))
    centre = (float(p) + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(float(p * (1 - p)) / n + (z / (2 * n)) ** 2)
    assert mean == 0.75
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-5)


@pytest.mark.parametrize("value", [0, 1])
def test_a_share_at_its_end_keeps_a_width(value: int) -> None:
    questions = [i // 4 for i in range(400)]
    low, mean, high = clustered_interval([value] * 400, questions)
    assert mean == value
    # Wilson with the 100 questions, not the 400 samples: z²/(n + z²) is 0.037.
    assert 0.036 < high - low < 0.039
    assert 0 <= low <= mean <= high <= 1


@pytest.mark.parametrize(
    ("share", "concentration", "questions", "samples"),
    [
        (0.97, 3.0, 100, 4),
        (0.7, 1.0, 60, 8),
        (0.5, 1e6, 40, 1),
        (0.99, 1e6, 300, 1),
        (0.3, 2.0, 15, 8),
        (0.99, 3.0, 100, 8),
        (0.97, 0.3, 100, 4),
    ],
)
def test_shares_are_covered_although_samples_of_a_question_are_alike(
    share: float, concentration: float, questions: int, samples: int
) -> None:
    rng = np.random.default_rng(7)
    alpha, beta = share * concentration, (1 - share) * concentration
    rates = rng.beta(alpha, beta, (REPEATS, questions))
    drawn = (rng.random((REPEATS, questions, samples)) < rates[..., None]).reshape(REPEATS, -1)
    clusters = np.repeat(np.arange(questions), samples).tolist()
    coverage = _coverage([clustered_interval(row, clusters) for row in drawn], share)
    assert 0.93 <= coverage <= 0.99


@pytest.mark.parametrize(
    ("questions", "share", "highest"),
    [
        (100, 0.2, 0.97),
        (100, 0.8, 0.97),
        (300, 0.5, 0.97),
        (30, 0.5, 1.0),
        (30, 0.95, 1.0),
        (100, 0.95, 1.0),
        (100, 0.995, 1.0),
    ],
)
def test_eight_samples_a_question_are_covered_as_promised(
    questions: int, share: float, highest: float
) -> None:
    repeats, clusters = 800, np.repeat(np.arange(questions), 8).tolist()
    rng = np.random.default_rng(13)
    rates = rng.beta(2 * share, 2 * (1 - share), (repeats, questions, 1))
    drawn = (rng.random((repeats, questions, 8)) < rates).reshape(repeats, -1)
    coverage = _coverage([clustered_interval(row, clusters) for row in drawn], share)
    # The band, widened by three standard errors of a simulated share at its edge.
    low, high = (3 * math.sqrt(edge * (1 - edge) / repeats) for edge in (0.93, highest))
    assert 0.93 - low <= coverage <= highest + high


def test_ratios_are_those_of_means_and_keep_no_width_alone() -> None:
    low, ratio, high = paired_ratio_interval([2.0, 4.0], "ab", [4.0, 8.0], "ab")
    assert (low, ratio, high) == pytest.approx((0.5, 0.5, 0.5))
    assert paired_ratio_interval([2.0, 4.0], "aa", [4.0], "a") == (-math.inf, 0.75, math.inf)


def test_ignoring_the_questions_would_not_cover() -> None:
    rng = np.random.default_rng(8)
    rates = rng.beta(0.5, 0.5, (REPEATS, 40))
    drawn = (rng.random((REPEATS, 40, 8)) < rates[..., None]).reshape(REPEATS, -1)
    naive = [clustered_interval(row, range(320)) for row in drawn[:300]]
    assert _coverage(naive, 0.5) < 0.75


def test_means_are_covered_with_unequal_numbers_of_samples() -> None:
    rng = np.random.default_rng(9)
    sizes = rng.integers(1, 9, 30)
    clusters = np.repeat(np.arange(30), sizes).tolist()
    intervals = []
    for _ in range(REPEATS):
        levels = rng.normal(100, 10, 30)
        intervals.append(
            clustered_interval(levels[clusters] + rng.normal(0, 5, len(clusters)), clusters)
        )
    assert 0.92 <= _coverage(intervals, 100) <= 0.98


def test_a_paired_difference_is_covered_and_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(10)
    clusters = np.repeat(np.arange(60), 4).tolist()
    intervals, apart = [], []
    for _ in range(REPEATS):
        hard = rng.normal(0, 20, 60)[clusters]
        first = 100 + hard + rng.normal(0, 5, 240)
        second = 97 + hard + rng.normal(0, 5, 240)
        intervals.append(paired_difference_interval(first, clusters, second, clusters))
        apart.append(clustered_interval(first, clusters))
    assert 0.93 <= _coverage(intervals, 3) <= 0.97
    width = np.mean([high - low for low, _, high in intervals])
    assert width < 0.3 * np.mean([high - low for low, _, high in apart])


def test_a_paired_difference_of_shares_is_covered_near_the_end() -> None:
    rng = np.random.default_rng(11)
    intervals = []
    for _ in range(REPEATS):
        first = rng.random(120) < 0.99
        second = first & (rng.random(120) < 0.98)
        intervals.append(paired_difference_interval(first, range(120), second, range(120)))
    assert 0.93 <= _coverage(intervals, 0.99 * 0.02) <= 0.995
    assert np.mean([high - low for low, _, high in intervals]) < 0.1


def test_ends_of_a_paired_interval_are_where_the_score_test_turns() -> None:
    n, b, c = 50, 12, 2
    first = [1] * b + [0] * c + [1] * (n - b - c)
    second = [0] * b + [1] * c + [1] * (n - b - c)
    low, mean, high = paired_difference_interval(first, range(n), second, range(n))
    assert mean == pytest.approx((b - c) / n)
    for end, sign in ((low, 1), (high, -1)):
        # The likelihood of the three cells given the difference, maximised on a fine grid.
        q = np.linspace(max(0.0, -end), (1 - end) / 2, 400_001)[1:-1]
        likelihood = b * np.log(q + end) + c * np.log(q) + (n - b - c) * np.log(1 - 2 * q - end)
        best = float(q[likelihood.argmax()])
        score = (b - c - n * end) / math.sqrt(n * (2 * best + end * (1 - end)))
        assert score == pytest.approx(sign * t_quantile(0.95, n - 1), abs=1e-3)


def test_two_systems_that_never_disagree_may_still_differ() -> None:
    low, mean, high = paired_difference_interval([1] * 100, range(100), [1] * 100, range(100))
    t2 = t_quantile(0.95, 99) ** 2
    assert mean == 0
    # Tango's limits at b = c = 0 are ± z²/(n + z²).
    assert (low, high) == pytest.approx((-t2 / (100 + t2), t2 / (100 + t2)), abs=1e-6)


def test_paired_systems_may_have_other_numbers_of_samples_in_another_order() -> None:
    first, second = [4.0, 8.0, 6.0], [3.0, 1.0, 5.0, 3.0, 3.0, 3.0]
    result = paired_difference_interval(first, "abc", second, "ccaabb")
    differences = np.array([4 - 4, 8 - 3, 6 - 2])
    half = t_quantile(0.95, 2) * differences.std(ddof=1) / math.sqrt(3)
    assert result == pytest.approx((3 - half, 3, 3 + half))


def test_simultaneous_intervals_hold_together() -> None:
    rng = np.random.default_rng(12)
    rates = [0.1, 0.4, 0.7, 0.95]
    together = 0
    for _ in range(600):
        drawn = [rng.random(150) < rate for rate in rates]
        intervals = [simultaneous_interval(row, range(150), len(rates)) for row in drawn]
        together += all(
            low <= r <= high for r, (low, _, high) in zip(rates, intervals, strict=True)
        )
    assert together / 600 >= 0.94


def test_simultaneous_confidence_is_bonferronis() -> None:
    assert simultaneous_confidence(5) == pytest.approx(0.99)
    assert simultaneous_interval([0, 1, 1], "abc", 1) == clustered_interval([0, 1, 1], "abc")
    with pytest.raises(ConfigError, match="at least 1"):
        simultaneous_confidence(0)


def test_equivalence_needs_the_whole_interval_inside_the_margin() -> None:
    assert equivalent((0.395, 0.4, 0.405), target=0.399, margin=0.01)
    assert not equivalent((0.395, 0.4, 0.41), target=0.399, margin=0.01)
    assert not equivalent((0.38, 0.4, 0.405), target=0.399, margin=0.01)


def test_one_question_says_nothing_about_others() -> None:
    assert clustered_interval([1, 1, 0], "aaa") == pytest.approx((0, 2 / 3, 1))
    assert clustered_interval([5.0, 7.0], "aa") == (-math.inf, 6, math.inf)
    assert paired_difference_interval([1, 0], "aa", [1], "a") == (-1, -0.5, 1)


def test_what_is_no_sample_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match="no values"):
        clustered_interval([], [])
    with pytest.raises(DataError, match="one cluster each, got 2 clusters"):
        clustered_interval([1, 0, 1], "ab")
    with pytest.raises(DataError, match="leave them out"):
        clustered_interval([1.0, math.nan], "ab")
    with pytest.raises(DataError, match="share=False"):
        clustered_interval([0.5, 1], "ab", share=True)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        clustered_interval([1, 0], "ab", confidence=95)
    with pytest.raises(DataError, match="by one of the two only"):
        paired_difference_interval([1, 0], "ab", [1, 0], "ac")
