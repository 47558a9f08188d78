import math

import numpy as np
import pytest

from flexalign.errors import DataError
from flexalign.evaluation.summary import (
    token_cut,
    token_cut_mean,
    token_cut_pooled,
)
from flexalign.statistics import token_cut_interval

# Table 1 of arXiv 2506.12704: mean tokens on AIME24, AIME25, MATH-500, and the cut in percent.
REFERENCE = (12602, 12278, 4699)
TABLE_1 = {
    "λ=0.5": ((10678, 10254, 3734), 17.42),
    "DeepScaleR": ((8520, 8143, 3030), 33.86),
    "λ=1.5": ((8091, 7353, 2982), 37.48),
    "λ=2": ((7441, 6498, 2897), 42.11),
    "λ=5": ((6297, 5652, 2844), 47.83),
    "λ=10": ((6004, 5174, 2713), 50.83),
    "iter1": ((5631, 4434, 2599), 54.63),
    "iter2": ((4294, 3887, 2483), 60.48),
}


@pytest.mark.parametrize("row", TABLE_1)
def test_the_papers_cuts_are_means_over_tasks(row: str) -> None:
    tokens, printed = TABLE_1[row]
    assert 100 * token_cut_mean(tokens, REFERENCE) == pytest.approx(printed, abs=0.02)


def test_pooled_is_another_figure() -> None:
    tokens, _ = TABLE_1["iter1"]
    assert token_cut_pooled(tokens, REFERENCE) == pytest.approx(0.572, abs=5e-4)


def test_an_interval_is_of_the_ratio_of_means_by_question() -> None:
    tokens, reference = [10.0, 30.0, 20.0, 40.0], [50.0, 90.0, 60.0, 100.0]
    low, cut, high = token_cut_interval(tokens, "aabb", reference, "aabb")
    assert cut == pytest.approx(1 - 100 / 300)
    ratio = 1 / 3
    parts = [(40 - ratio * 140) / 300, (60 - ratio * 160) / 300]
    half = 12.7062 * math.sqrt(2 * sum(part**2 for part in parts))
    assert (low, high) == pytest.approx((cut - half, cut + half), rel=1e-4)


def test_the_interval_covers_although_samples_of_a_question_are_alike() -> None:
    rng = np.random.default_rng(0)
    questions = np.repeat(np.arange(60), 4).tolist()
    covered = 0
    for _ in range(1000):
        length = rng.gamma(4, 25, 60)[questions]
        share = rng.beta(3, 3, 60)[questions]
        first, second = (length * rng.gamma(9, 1 / 9, 240) for _ in range(2))
        low, _, high = token_cut_interval(first * share, questions, second, questions)
        covered += low <= 0.5 <= high
    # 0.95 ± four standard errors of 1000 repetitions, 0.0276.
    assert 0.922 <= covered / 1000 <= 0.978


def test_what_has_no_cut_is_refused() -> None:
    with pytest.raises(DataError, match="writes something"):
        token_cut(5, 0)
    with pytest.raises(DataError, match="above zero"):
        token_cut_interval([1, 2], "ab", [0, 0], "ab")
    with pytest.raises(DataError, match="one of the two only"):
        token_cut_interval([1, 2], "ab", [1, 2], "ac")
    with pytest.raises(DataError, match="one figure each"):
        token_cut_mean([1], [1, 2])
    with pytest.raises(DataError, match="one figure each"):
        token_cut_pooled([], [])
