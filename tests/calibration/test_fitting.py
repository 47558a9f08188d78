from dataclasses import replace

import numpy as np
import pytest

from flexalign.calibration.calibrate import _require_saving
from flexalign.calibration.cascade import Cascade, fit_thresholds
from flexalign.calibration.effort import AchievedRatio, Calibration, effort_to_dial, show_effort
from flexalign.calibration.fitting import (
    describe_deeper,
    describe_loss,
    effort_levels,
    find_holes,
    fit_lambdas,
    judge_deeper,
    require_saving,
)
from flexalign.errors import ConfigError
from flexalign.evaluation.samples import Samples
from flexalign.statistics import paired_difference_interval

COUNT = 400
QUESTIONS = [str(number) for number in range(COUNT)]


def answers(tokens, right, seed=0):
    generator = np.random.default_rng(seed)
    lengths = tokens * generator.lognormal(0, 0.4, COUNT)
    return Samples(QUESTIONS, np.arange(COUNT) < round(right * COUNT), lengths)


def test_a_dial_that_moves_nothing_is_refused_with_what_was_measured():
    reference = answers(100, 1)
    faster = {f"λ={number}": answers(100, 1, seed=number) for number in range(1, 9)}
    with pytest.raises(ConfigError) as caught:
        require_saving(faster, reference, "mend it")
    assert "no setting of this dial saves tokens beyond chance: λ=" in str(caught.value)
    assert "of λ = 0's tokens on 400 questions, so that there is no effort" in str(caught.value)
    assert "; mend it, or, if" in str(caught.value)


def test_one_setting_that_saves_is_enough():
    faster = {"λ=0.5": answers(130, 1, seed=1), "λ=1": answers(50, 1, seed=2)}
    require_saving(faster, answers(100, 1), "mend it")


def test_intervals_hold_together_for_all_settings():
    """A saving that stands out alone, but not as the best of twenty, is chance."""
    reference = answers(100, 1)
    barely = Samples(QUESTIONS, reference.correct, reference.tokens.copy())
    noise = np.random.default_rng(5).normal(0, 30, COUNT)
    barely.tokens[:] += noise - noise.mean() - 2.4 * 30 / np.sqrt(COUNT)
    require_saving({"λ=1": barely}, reference, "mend it")
    others = {f"λ={number}": reference for number in range(2, 21)}
    with pytest.raises(ConfigError, match="λ=1 cuts most"):
        require_saving({"λ=1": barely} | others, reference, "mend it")


def ways(fast_right, fast_tokens=10, is_sure_of_right=False):
    fast, slow = answers(fast_tokens, fast_right, seed=3), answers(100, 0.8, seed=4)
    sure = np.random.default_rng(6).permutation(COUNT) / COUNT
    if is_sure_of_right:
        sure = np.where(fast.correct, 0.5 + sure / 2, sure / 2)
    return (
        Cascade(Samples(QUESTIONS, fast.correct, fast.tokens, confidence=sure), slow),
        {0.0: slow},
    )


def test_each_kind_of_dial_is_told_its_own_way_out():
    both, fixed = ways(0.5, fast_tokens=100)
    with pytest.raises(ConfigError, match=r"the fast answer cuts most.*take --dial lambda, or"):
        _require_saving({"λ=0": fixed[0.0]}, both, {0.0: 100.0})
    names = {"λ=0": fixed[0.0], "λ=-1": answers(10, 1), "λ=1": answers(100, 1, seed=8)}
    names["λ=0.5"] = answers(10, 1)  # inside a hole: no effort goes there
    with pytest.raises(ConfigError, match=r"λ=1 cuts most.*widen --lambda-range, or"):
        _require_saving(names, None, {-1.0: 10.0, 0.0: 100.0, 1.0: 100.0})


def adaptive(both, fixed, margin=0.02):
    efforts = [0, 25, 50, 75, 100]
    points = tuple(zip(efforts, fit_thresholds(both, efforts), strict=True))
    calibration = Calibration(
        ((100.0, 0.0),), points, measure="answer_probability", margin=margin, dial="adaptive"
    )
    return replace(calibration, levels=effort_levels(calibration, both, fixed))


def test_a_fast_end_that_is_mostly_wrong_makes_every_effort_useless():
    both, fixed = ways(0.05)
    calibration = adaptive(both, fixed)
    loss = describe_loss(calibration)
    best = calibration.levels[3]
    low, mean, high = paired_difference_interval(
        both.correct(float(best.setting.split()[1])), QUESTIONS, fixed[0.0].correct, QUESTIONS
    )
    assert (best.effort, best.accuracy_change.mean) == (75, pytest.approx(mean, abs=0.003))
    change = best.accuracy_change
    assert [change.low, change.high] == pytest.approx([low, high], abs=0.003)
    low, high = change.low, change.high
    assert "every effort below 100 is less accurate than λ = 0 by more than" in loss
    figures = f"{-100 * change.mean:.1f} points [{-100 * high:.1f}, {-100 * low:.1f}]:"
    assert f"the margin of 2 points; effort 75 loses least, {figures} train" in loss
    assert describe_loss(replace(calibration, margin=0.3)) is None


def test_one_effort_that_may_do_is_enough():
    assert describe_loss(adaptive(*ways(0.5, is_sure_of_right=True))) is None


def test_a_loss_that_may_be_chance_is_no_loss():
    assert describe_loss(adaptive(*ways(0.79))) is None


def test_between_two_measured_lambdas_accuracy_changes_along_the_line():
    fixed = {0.0: answers(100, 0.8), 0.5: answers(80, 0.6), 1.0: answers(20, 0.1)}
    tokens = {lam: float(own.tokens.mean()) for lam, own in fixed.items()}
    calibration = Calibration(fit_lambdas(tokens), margin=0.02)
    levels = effort_levels(calibration, None, fixed)
    assert levels[-1].accuracy_change == (0, 0, 0)
    for level in levels[:-1]:
        low, change, high = level.accuracy_change
        assert change == pytest.approx(level.metrics.accuracy.mean - 0.8)
        assert low < change < high
    assert "effort 75 loses least" in describe_loss(replace(calibration, levels=levels))
    calibration = replace(calibration, holes=((0.0, 1.0),))  # effort 75 takes λ = 0: no step
    snapped = effort_levels(calibration, None, fixed)
    assert snapped[3].setting == "λ=0"
    assert "effort 0 loses least" in describe_loss(replace(calibration, levels=snapped))


def percentiles(achieved, asked):
    return np.quantile(
        [one / line for one, line in zip(achieved, asked, strict=True)], [0.1, 0.5, 0.9]
    )


def test_each_question_is_asked_for_the_tokens_on_its_own_line():
    """A coin between two ways has the line's mean, and no question has what it was asked for."""
    lengths = np.random.default_rng(9).integers(50, 150, COUNT)
    slow = Samples(QUESTIONS, right(0.8), lengths)
    sure = np.random.default_rng(6).permutation(COUNT) / COUNT
    both = Cascade(Samples(QUESTIONS, right(0.7, 1), np.full(COUNT, 10), confidence=sure), slow)
    levels = adaptive(both, {0.0: slow}).levels
    assert abs(levels[2].metrics.tokens.mean / levels[2].line - 1) < 0.01
    for level, threshold in zip(levels[:4], fit_thresholds(both, [0, 25, 50, 75]), strict=True):
        taken = [10 if s >= threshold else 10 + n for s, n in zip(sure, lengths, strict=True)]
        asked = [10 + level.effort / 100 * (n - 10) for n in lengths]
        ratio = level.achieved
        found = [ratio.p10, ratio.median, ratio.p90]
        assert found == pytest.approx(percentiles(taken, asked), rel=1e-12)
    assert levels[2].achieved.p10 < 0.25
    assert levels[2].achieved.p90 > 1.8
    assert [levels[-1].achieved, levels[0].achieved] == [AchievedRatio(1.0, 1.0, 1.0)] * 2


def test_samples_of_a_question_count_as_their_mean_and_a_line_below_0_is_left_out():
    names = [str(number) for number in range(10) for _ in range(2)]
    slow, fast = np.tile([60, 140], 10), np.tile([10, 30], 10)
    slow[:2], fast[:2] = 20, 200  # a question whose fast answers are long
    tokens = {-1.0: 2.0 * slow, 0.0: 1.0 * slow, 1.0: 1.0 * fast}
    fixed = {lam: Samples(names, np.ones(20, bool), own) for lam, own in tokens.items()}
    means = {lam: float(own.mean()) for lam, own in tokens.items()}
    levels = effort_levels(Calibration(fit_lambdas(means)), None, fixed)

    deepest = levels[-1]
    share = deepest.effort / 100
    assert share > 2
    assert 200 + share * (20 - 200) < 0
    # All other questions are the same: 20 and 100 tokens, and 200 at the deepest λ.
    ratio = 200 / (20 + share * 80)
    found = [deepest.achieved.p10, deepest.achieved.median, deepest.achieved.p90]
    assert found == pytest.approx([ratio] * 3)


def test_between_two_measured_lambdas_the_ratios_of_both_are_mixed():
    fixed = {0.0: answers(100, 0.8), 0.5: answers(80, 0.6, 1), 1.0: answers(20, 0.1, 2)}
    tokens = {lam: float(own.tokens.mean()) for lam, own in fixed.items()}
    calibration = Calibration(fit_lambdas(tokens))
    level = effort_levels(calibration, None, fixed)[1]
    lam = float(level.setting.removeprefix("λ="))
    assert 0.5 < lam < 1
    asked = fixed[1.0].tokens + 0.25 * (fixed[0.0].tokens - fixed[1.0].tokens)
    ends = [percentiles(fixed[end].tokens, asked) for end in (0.5, 1.0)]
    mixed = (1 - lam) / 0.5 * ends[0] + (lam - 0.5) / 0.5 * ends[1]
    found = [level.achieved.p10, level.achieved.median, level.achieved.p90]
    assert found == pytest.approx(list(mixed), rel=1e-4)  # the id of λ has six digits


def test_no_ratio_where_no_question_is_asked_for_tokens():
    assert AchievedRatio.of([3.0, 4.0], [0.0, -1.0]) is None


def deeper(gained, tokens=150, margin=0.02):
    """A dial of λ whose accuracy changes from 0.7 to 0.7 + gained at λ = −0.5."""
    fixed = {-0.5: answers(tokens, 0.7 + gained), 0.0: answers(100, 0.7), 1.0: answers(20, 0.6)}
    means = {lam: float(own.tokens.mean()) for lam, own in fixed.items()}
    made = Calibration(fit_lambdas(means), margin=margin, lambda_range=(-0.5, 1.0))
    return replace(made, levels=effort_levels(made, None, fixed))


@pytest.mark.parametrize(
    ("gained", "verdict", "end"),
    [
        (0.1, "pays", "against effort 100: thinking deeper pays."),
        (0.005, "costs tokens only", "only, as a gain above 2 points is excluded."),
        (-0.1, "costs tokens only", "only, as a gain above 2 points is excluded."),
        (0.0, "costs tokens only", "only, as a gain above 2 points is excluded."),
    ],
)
def test_an_effort_above_100_says_whether_it_pays(gained, verdict, end):
    calibration = deeper(gained)
    assert judge_deeper(calibration) == verdict
    said = describe_deeper(calibration)
    longer = calibration.levels[-1].metrics.tokens.mean / calibration.levels[4].metrics.tokens.mean
    assert f"(λ=-0.5) takes {100 * longer - 100:+.1f} % tokens and" in said
    deep, base = (np.arange(COUNT) < round(share * COUNT) for share in (0.7 + gained, 0.7))
    low, mean, high = paired_difference_interval(deep, QUESTIONS, base, QUESTIONS)
    assert f"{100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]" in said
    assert said.endswith(end)


def test_a_gain_that_may_be_chance_is_not_decided():
    fixed = {-0.5: answers(150, 0.7), 0.0: answers(100, 0.7), 1.0: answers(20, 0.6)}
    swapped = fixed[-0.5].correct.copy()
    swapped[np.r_[:40, -50:0]] = np.r_[np.zeros(40, bool), np.ones(50, bool)]
    fixed[-0.5] = Samples(QUESTIONS, swapped, fixed[-0.5].tokens)
    means = {lam: float(own.tokens.mean()) for lam, own in fixed.items()}
    made = Calibration(fit_lambdas(means), margin=0.02, lambda_range=(-0.5, 1.0))
    made = replace(made, levels=effort_levels(made, None, fixed))
    assert made.levels[-1].accuracy_change.mean == pytest.approx(0.025)
    assert judge_deeper(made) == "not decided"
    assert "neither a gain nor its absence (above 2 points) is shown" in describe_deeper(made)
    assert "against effort 100: not decided: neither a gain" in describe_deeper(made)


@pytest.mark.parametrize(
    ("effort", "shown"), [(25.0, "25"), (142.0048, "142"), (138.69, "138.6"), (138.7, "138.7")]
)
def test_an_effort_is_shown_rounded_and_never_above_what_is_allowed(effort, shown):
    assert show_effort(effort) == shown
    made = Calibration(((0.0, 1.0), (100.0, 0.0), (effort + 100, -0.5)))
    told = show_effort(made.largest_effort)
    assert effort_to_dial(made, float(told)).lam <= 0
    with pytest.raises(ConfigError, match=rf"\(fastest\) to {told} \(100"):
        effort_to_dial(made, 1000)


def test_without_a_lambda_below_0_nothing_is_said_of_it():
    calibration = replace(deeper(0.1), lambda_range=(0.0, 1.0))
    assert describe_deeper(calibration) is None
    assert describe_deeper(deeper(0.1, tokens=90)).startswith("no measured λ below 0 thinks longer")


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
