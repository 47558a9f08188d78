import math

import numpy as np
import pytest

from flexalign.calibration import NonInferiority, TokenBudget
from flexalign.evaluation.samples import Samples


def _samples(correct: list[list[int]], tokens: float) -> Samples:
    table = np.array(correct, dtype=bool)
    return Samples.from_table(table, np.full(table.shape, tokens))


CANDIDATE = _samples([[1, 0], [0, 0], [1, 1]], 60)
REFERENCE = _samples([[1, 1], [0, 0], [1, 0]], 100)


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
    assert TokenBudget(1).bound(slack, 0.05) == pytest.approx(-half, rel=1e-5)
    corrected = -half - 0.5 / 20
    assert NonInferiority(0.1).bound(slack, 0.05) == pytest.approx(corrected, rel=1e-5)


def test_few_questions_without_a_loss_prove_nothing():
    goal = NonInferiority(0.03)
    assert goal.bound(np.full(60, 0.03), 0.05) < 0
    assert goal.bound(np.full(300, 0.03), 0.05) > 0


def test_rare_whole_losses_at_the_margin_seldom_pass():
    margin, questions, repetitions = 0.03, 300, 4000
    generator = np.random.default_rng(0)
    goal = NonInferiority(margin)
    losses = generator.random((repetitions, questions)) < margin
    passed = [goal.bound(margin - row, 0.05) > 0 for row in losses]
    assert np.mean(passed) <= 0.05


def test_few_long_answers_seldom_hide_that_the_budget_is_broken():
    generator = np.random.default_rng(0)
    tokens = np.exp(generator.normal(-0.5, 1.0, (4000, 150)))  # mean 1, leaning far
    budget = TokenBudget(1.0)
    assert np.mean([budget.bound(1 - row, 0.05) > 0 for row in tokens]) <= 0.06
    student = [NonInferiority(1e-9).bound(1 - row, 0.05) + 1 / 300 > 0 for row in tokens]
    assert np.mean(student) > 0.09


def test_johnsons_bound_solves_his_equation():
    slack = 1 - np.exp(np.random.default_rng(1).normal(-0.5, 1.0, 150))
    spread, third = slack.std(ddof=1), ((slack - slack.mean()) ** 3).mean()
    gap = slack.mean() - TokenBudget(1.0).bound(slack, 0.05)
    score = gap + third / (6 * spread**2 * 150) + third * gap**2 / (3 * spread**4)
    assert score * math.sqrt(150) / spread == pytest.approx(1.65514, rel=1e-4)  # t, 149 degrees


def test_answers_of_one_length_need_no_bound():
    assert TokenBudget(10).bound(np.full(20, 3.0), 0.05) == 3.0
