import math

import numpy as np
import pytest

from flexalign.calibration import NonInferiority, Outcomes, TokenBudget
from flexalign.calibration.goals import lower_bound


def _outcomes(correct: list[list[int]], tokens: float) -> Outcomes:
    table = np.array(correct, dtype=bool)
    return Outcomes(table, np.full(table.shape, tokens))


CANDIDATE = _outcomes([[1, 0], [0, 0], [1, 1]], 60)
REFERENCE = _outcomes([[1, 1], [0, 0], [1, 0]], 100)


def test_slack_of_non_inferiority_is_difference_plus_margin():
    goal = NonInferiority(0.1)
    assert goal.slack(CANDIDATE, REFERENCE) == pytest.approx([-0.4, 0.1, 0.6])
    assert goal.gain(CANDIDATE, REFERENCE) == pytest.approx(0.4)


def test_slack_of_a_budget_is_what_is_left():
    goal = TokenBudget(75)
    assert goal.slack(CANDIDATE, REFERENCE) == pytest.approx([15, 15, 15])
    assert goal.gain(CANDIDATE, REFERENCE) == 0.5


def test_the_bound_is_students_where_questions_vary():
    slack = np.array([-1.0, 1.0] * 10)
    half = 1.72913 * slack.std(ddof=1) / math.sqrt(20)  # t, 19 degrees of freedom, one-sided 5 %
    assert lower_bound(slack, TokenBudget(1), 0.05) == pytest.approx(-half, rel=1e-5)
    corrected = -half - 0.5 / 20
    assert lower_bound(slack, NonInferiority(0.1), 0.05) == pytest.approx(corrected, rel=1e-5)


def test_few_questions_without_a_loss_prove_nothing():
    goal = NonInferiority(0.03)
    assert lower_bound(np.full(60, 0.03), goal, 0.05) < 0
    assert lower_bound(np.full(300, 0.03), goal, 0.05) > 0


def test_rare_whole_losses_at_the_margin_seldom_pass():
    margin, questions, repetitions = 0.03, 300, 4000
    generator = np.random.default_rng(0)
    losses = generator.random((repetitions, questions)) < margin
    passed = [lower_bound(margin - row, NonInferiority(margin), 0.05) > 0 for row in losses]
    assert np.mean(passed) <= 0.05
