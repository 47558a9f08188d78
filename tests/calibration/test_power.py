import math

import numpy as np
import pytest

from flexalign.calibration import VarianceModel, plan
from flexalign.calibration.power import TASK_ACCURACY
from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.samples import Samples


def test_aime_proves_about_eight_points_and_math500_about_one_and_a_half():
    aime = plan(30, 8, variance=VarianceModel.assumed(TASK_ACCURACY["aime"]))
    math500 = plan(500, 8, variance=VarianceModel.assumed(TASK_ACCURACY["math500"]))
    assert 0.075 < aime.margin < 0.085
    assert 0.0145 < math500.margin < 0.0165


def test_the_margin_has_the_power_that_is_said():
    variance = VarianceModel(between=0.003, within=0.12)
    made = plan(200, 4, variance=variance)
    generator = np.random.default_rng(0)
    differences = generator.normal(0, math.sqrt(variance.of_question(4)), (20_000, 200))
    errors = differences.std(1, ddof=1) / math.sqrt(200)
    proved = differences.mean(1) + made.margin > 1.6525 * errors  # t, 199 degrees of freedom
    assert proved.mean() == pytest.approx(0.8, abs=0.012)


def test_costs_just_reach_their_margin():
    variance = VarianceModel(between=0.002, within=0.1)
    made = plan(400, 4, variance=variance, margins=(0.02,))
    (cost,) = made.costs
    assert plan(cost.questions, 4, variance=variance).margin <= 0.02
    assert plan(cost.questions - 1, 4, variance=variance).margin > 0.02
    assert plan(400, cost.samples, variance=variance).margin <= 0.02
    assert plan(400, cost.samples - 1, variance=variance).margin > 0.02


def test_no_number_of_samples_mends_too_few_questions():
    made = plan(30, 8, variance=VarianceModel(between=0.01, within=0.1), margins=(0.02,))
    assert made.costs[0].samples is None
    assert made.costs[0].questions > 30


def test_tune_proves_less_on_what_it_holds_out():
    variance = VarianceModel(between=0.02, within=0.1)  # above the floor of whole losses
    made = plan(500, 8, variance=variance, choosing_share=0.4)
    assert made.tune_margin == pytest.approx(plan(300, 8, variance=variance).margin + 1 / 600)
    assert made.tune_margin > made.margin


def test_tune_does_not_believe_in_too_little_variance():
    variance = VarianceModel(between=0.0, within=0.0)
    made = plan(100, 8, variance=variance, choosing_share=0.0)
    deviation = math.sqrt(made.tune_margin * (1 - made.tune_margin))
    assert (made.margin, made.costs) == (0, ())
    assert made.tune_margin == pytest.approx(
        1.66039 * deviation / 10 + 1 / 200, rel=1e-4
    )  # t, 99 degrees


def test_a_pilot_gives_the_variances_back():
    generator = np.random.default_rng(3)
    rates = generator.beta(2, 1, 4000)
    shifted = np.clip(rates + generator.normal(0, 0.1, 4000), 0, 1)
    drawn = [generator.random((4000, 6)) < rate[:, None] for rate in (shifted, rates)]
    pilot = [Samples.from_table(correct, np.ones(correct.shape)) for correct in drawn]
    model = VarianceModel.measured(*pilot)
    within = (rates * (1 - rates) + shifted * (1 - shifted)).mean()
    assert model.within == pytest.approx(within, rel=0.03)
    assert model.between == pytest.approx((shifted - rates).var(), abs=0.003)


def test_common_random_numbers_shrink_what_a_pilot_finds():
    generator = np.random.default_rng(4)
    rates = generator.beta(2, 1, 500)[:, None]
    noise = generator.random((500, 8))
    same = Samples.from_table(noise < rates, np.ones((500, 8)))
    assert VarianceModel.measured(same, same) == VarianceModel(0.0, 0.0)


def test_plan_as_json():
    made = plan(100, 4).to_json()
    assert made["questions"] == 100
    assert len(made["costs"]) == 3
    assert made["variance"]["between"] == pytest.approx(0.07**2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"questions": 1, "samples": 8},
        {"questions": 30, "samples": 0},
        {"questions": 30, "samples": 8, "confidence": 0.4},
        {"questions": 30, "samples": 8, "power": 1.0},
        {"questions": 30, "samples": 8, "margins": (0.0,)},
    ],
)
def test_what_cannot_be_planned_is_said(arguments):
    with pytest.raises(ConfigError):
        plan(**arguments)


def test_too_small_a_pilot_is_refused():
    one = Samples.from_table(np.ones((5, 1), bool), np.ones((5, 1)))
    with pytest.raises(DataError, match="a pilot needs"):
        VarianceModel.measured(one, one)


def test_an_assumption_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="accuracy and alike"):
        VarianceModel.assumed(1.5)
