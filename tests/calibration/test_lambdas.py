import numpy as np
import pytest

from flexalign.calibration.fitting import find_holes, fit_lambdas
from flexalign.errors import ConfigError

QUESTIONS = [str(number) for number in range(400)]


def right(share, seed=0):
    return np.random.default_rng(seed).random(len(QUESTIONS)) < share


def test_points_follow_the_measured_tokens():
    points = fit_lambdas({-0.5: 150.0, 0.0: 100.0, 0.5: 80.0, 1.0: 20.0})
    assert list(points) == [(0.0, 1.0), (75.0, 0.5), (100.0, 0.0), (162.5, -0.5)]


def test_the_reference_is_effort_100_whatever_its_tokens():
    means = np.random.default_rng(0).uniform(50, 100, 200)
    assert {fit_lambdas({0.0: mean, 1.0: 3.0})[-1] for mean in means} == {(100.0, 0.0)}


def test_a_rise_by_chance_is_pooled_and_the_map_stays_monotone():
    points = fit_lambdas({0.0: 100.0, 0.25: 70.0, 0.5: 74.0, 1.0: 20.0})
    assert list(points) == [(0.0, 1.0), (65.0, 0.25), (100.0, 0.0)]


def test_where_the_last_lambdas_save_nothing_more_the_first_of_them_is_the_fastest():
    assert fit_lambdas({0.0: 100.0, 0.5: 20.0, 1.0: 20.0})[0] == (0.0, 0.5)


def test_a_dial_that_saves_nothing_is_refused():
    with pytest.raises(ConfigError, match="saves no tokens"):
        fit_lambdas({0.0: 100.0, 1.0: 101.0})


def test_a_range_worse_than_both_its_ends_is_a_hole():
    shares = {0.0: 0.9, 0.25: 0.6, 0.5: 0.5, 0.75: 0.9, 1.0: 0.88}
    correct = {lam: right(share) for lam, share in shares.items()}
    assert find_holes(correct, QUESTIONS) == [(0.0, 0.75)]


def test_a_dial_that_only_falls_has_no_hole():
    shares = {0.0: 0.9, 0.25: 0.7, 0.5: 0.5, 0.75: 0.3}
    assert find_holes({lam: right(share) for lam, share in shares.items()}, QUESTIONS) == []


def test_equal_settings_are_rarely_called_holes():
    found = [
        bool(find_holes({lam / 8: right(0.8, 9 * seed + lam) for lam in range(9)}, QUESTIONS))
        for seed in range(40)
    ]
    assert sum(found) <= 4
