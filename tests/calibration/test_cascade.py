import itertools

import numpy as np
import pytest

from flexalign.calibration.cascade import Cascade, fit_thresholds
from flexalign.evaluation.samples import Samples


def world(count, seed, levels=None):
    """Confidence that is right as often as it says; slow answers longer where it is low."""
    rng = np.random.default_rng(seed)
    sure = rng.beta(2, 1.5, count)
    if levels:
        sure = np.round(sure * levels) / levels
    questions = [str(number) for number in range(count)]
    sure_or_cut = np.where(rng.random(count) < 0.02, -1.0, sure)
    fast_right = rng.random(count) < sure
    slow_tokens = rng.gamma(4, 40 - 20 * sure)
    return Cascade(
        Samples(questions, fast_right, np.full(count, 4.0), confidence=sure_or_cut),
        Samples(questions, rng.random(count) < 0.8, slow_tokens),
    )


def test_tokens_and_accuracy_are_those_of_a_walk_over_the_questions():
    ways = world(200, 1)
    for threshold in (0.0, 0.3, 0.77, 1.0):
        tokens, right = 0.0, 0
        for place, sure in enumerate(ways.fast.confidence):
            tokens += ways.fast.tokens[place]
            if sure >= threshold:
                right += ways.fast.correct[place]
            else:
                tokens += ways.slow.tokens[place]
                right += ways.slow.correct[place]
        assert ways.tokens(threshold).sum() == pytest.approx(tokens)
        assert ways.correct(threshold).sum() == right


def test_thresholds_rise_and_lie_on_the_line_to_one_question():
    ways = world(2000, 2)
    efforts = list(range(0, 101, 5))
    thresholds = fit_thresholds(ways, efforts)
    assert thresholds[0] == 0.0
    assert all(later >= earlier for earlier, later in itertools.pairwise(thresholds))
    fastest, slowest = ways.tokens(0.0).mean(), ways.slow.tokens.mean()
    for effort, threshold in zip(efforts[:-1], thresholds[:-1], strict=True):
        line = fastest + effort / 100 * (slowest - fastest)
        assert abs(ways.tokens(threshold).mean() - line) <= ways.slow.tokens.max() / 2000


def test_the_line_holds_on_fresh_questions():
    efforts = [25, 50, 75]
    thresholds = fit_thresholds(world(5000, 3), efforts)
    fresh = world(20_000, 4)
    fastest, slowest = fresh.tokens(0.0).mean(), fresh.slow.tokens.mean()
    for effort, threshold in zip(efforts, thresholds, strict=True):
        line = fastest + effort / 100 * (slowest - fastest)
        assert fresh.tokens(threshold).mean() == pytest.approx(line, rel=0.1)


def test_a_confidence_of_few_values_gives_steps_and_stays_monotone():
    ways = world(500, 5, levels=4)
    thresholds = fit_thresholds(ways, list(range(0, 101, 5)))
    tokens = [ways.tokens(threshold).mean() for threshold in thresholds]
    assert all(0 <= threshold <= 1 for threshold in thresholds)
    assert all(later >= earlier for earlier, later in itertools.pairwise(tokens))
    assert len(set(tokens)) <= 6
