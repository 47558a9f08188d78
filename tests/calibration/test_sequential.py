import math

import numpy as np
import pytest

from flexalign.calibration.sequential import (
    betting_wealth,
    look_levels,
    predictive_power,
    spent_error,
)
from flexalign.errors import ConfigError

FIFTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


@pytest.mark.parametrize(
    ("looks", "scores"),
    [
        # Lan-DeMets boundaries as printed for five looks at one-sided 0.025
        ("obrien-fleming", (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)),
        ("pocock", (2.4380, 2.4268, 2.4101, 2.3966, 2.3859)),
    ],
)
def test_boundaries_are_the_printed_ones(looks, scores):
    levels = look_levels(FIFTHS, 0.025, looks)
    expected = [math.erfc(score / math.sqrt(2)) / 2 for score in scores]
    assert levels == pytest.approx(expected, rel=2e-3)


def test_a_single_look_spends_all():
    assert look_levels((1.0,), 0.05, "pocock") == pytest.approx((0.05,), rel=1e-6)


@pytest.mark.parametrize("looks", ["obrien-fleming", "pocock"])
def test_spending_rises_to_alpha(looks):
    spent = [spent_error(fraction, 0.05, looks) for fraction in FIFTHS]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("looks", ["obrien-fleming", "pocock"])
def test_all_looks_together_err_by_alpha(looks):
    levels = np.array(look_levels((0.1, 0.3, 0.6, 1.0), 0.05, looks))
    generator = np.random.default_rng(0)
    steps = np.sqrt([0.1, 0.2, 0.3, 0.4]) * generator.normal(size=(200_000, 4))
    scores = np.cumsum(steps, 1) / np.sqrt([0.1, 0.3, 0.6, 1.0])
    passed = np.vectorize(lambda z: math.erfc(z / math.sqrt(2)) / 2)(scores) < levels
    assert passed.any(1).mean() == pytest.approx(0.05, abs=4 * math.sqrt(0.0475 / 200_000))


@pytest.mark.parametrize("fractions", [(), (0.5, 0.5), (0.0, 1.0), (1.0, 0.5)])
def test_looks_must_come_in_order(fractions):
    with pytest.raises(ConfigError, match="rising fractions"):
        look_levels(fractions, 0.05, "pocock")


def test_betting_spends_no_alpha():
    with pytest.raises(ConfigError, match="spends no alpha"):
        look_levels((1.0,), 0.05, "betting")


def test_predictive_power_agrees_with_simulation():
    generator = np.random.default_rng(1)
    score, fraction = 1.2, 0.4
    running = score * math.sqrt(fraction)  # the sum so far; its drift is known to ± 1/√fraction
    drift = running / fraction + generator.normal(size=400_000) / math.sqrt(fraction)
    rest = drift * (1 - fraction) + math.sqrt(1 - fraction) * generator.normal(size=400_000)
    share = (running + rest > 1.6449).mean()
    assert predictive_power(score, fraction, 0.05) == pytest.approx(share, abs=3e-3)


def test_wealth_is_the_product_of_the_bets():
    slack = np.array([0.2, -0.1, 0.3])
    wealth, peak, stake = 1.0, 1.0, 0.0
    for step in range(3):
        wealth *= 1 + stake * slack[step]
        peak = max(peak, wealth)
        seen = slack[: step + 1]
        stake = (seen.sum() / (step + 2)) / (((seen**2).sum() + 0.25) / (step + 2))
        stake = min(max(stake, 0.0), 0.75 / 0.98)
    assert betting_wealth(slack, -0.98) == pytest.approx(peak)


def test_wealth_seldom_grows_where_the_promise_is_broken():
    generator = np.random.default_rng(2)
    slack = np.where(generator.random((2000, 300)) < 0.02, -0.98, 0.02)  # mean 0, rare whole losses
    rich = np.mean([betting_wealth(row, -0.98) >= 20 for row in slack])
    assert rich <= 0.05
