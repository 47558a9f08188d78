import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.frontier import (
    ParetoPoint,
    Point,
    _free_corner,
    chord_distance,
    chord_height,
    distance_intervals,
    draw_pareto,
    hull_distance,
    hull_height,
    significantly_above,
    significantly_below,
    upper_hull,
)
from flexalign.evaluation.samples import Samples
from flexalign.statistics import Interval

# Table 9 of arXiv 2506.12704, DeepSeek-R1-Distill-Qwen: λ = 0, 0.25, 0.5, 1 as accuracy, tokens.
TABLE_9 = {
    "7B AIME24": [(51.67, 10576), (47.50, 9942), (42.92, 8718), (11.25, 619)],
    "7B AIME25": [(36.67, 11279), (31.67, 9003), (30.00, 8629), (7.50, 658)],
    "7B MATH-500": [(87.83, 3667), (87.95, 3073), (86.40, 2291), (70.40, 440)],
    "1.5B MATH-500": [(80.23, 4699), (78.65, 3321), (67.75, 1765), (60.75, 480)],
}
DISTANCES = {
    "7B AIME24": (-1.60, -1.21),
    "7B AIME25": (1.25, 0.61),
    "7B MATH-500": (3.33, 6.00),
    "1.5B MATH-500": (4.78, 1.07),
}


@pytest.mark.parametrize("task", TABLE_9)
def test_the_papers_dial_is_held_against_its_own_chord(task: str) -> None:
    slow, quarter, half, fast = (Point(tokens, share) for share, tokens in TABLE_9[task])
    found = [chord_distance(point, slow, fast) for point in (quarter, half)]
    assert found == pytest.approx(DISTANCES[task], abs=0.005)


def test_the_ends_are_on_the_chord_and_nothing_lies_beyond_them() -> None:
    slow, fast = Point(100, 0.9), Point(20, 0.5)
    assert chord_height(60, slow, fast) == chord_height(60, fast, slow) == pytest.approx(0.7)
    assert [chord_height(t, slow, fast) for t in (5, 20, 100, 500)] == [0.5, 0.5, 0.9, 0.9]
    assert chord_height(7, Point(7, 0.2), Point(7, 0.4)) == pytest.approx(0.3)


def test_the_hull_is_what_no_mixture_of_two_points_surpasses() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [Point(*row) for row in rng.random((8, 2))]
        corners = upper_hull(points)
        assert set(corners) <= set(points)
        for at in rng.random(20):
            reached = [p.accuracy for p in points if p.tokens <= at]
            for a, b in itertools.permutations(points, 2):
                if a.tokens <= at < b.tokens:
                    share = (at - a.tokens) / (b.tokens - a.tokens)
                    reached.append((1 - share) * a.accuracy + share * b.accuracy)
            if reached:
                assert hull_height(at, points) == pytest.approx(max(reached))
        assert max(hull_distance(p, points) for p in points) <= 1e-12


def test_a_setting_that_costs_more_and_is_worse_is_no_corner() -> None:
    points = [Point(10, 0.5), Point(20, 0.9), Point(30, 0.8), Point(20, 0.7), Point(15, 0.6)]
    assert upper_hull(points) == [Point(10, 0.5), Point(20, 0.9)]
    assert hull_distance(points[2], points) == pytest.approx(-0.1)
    with pytest.raises(DataError, match="at least one"):
        upper_hull([])


def _dial(rng: np.random.Generator, questions: int, ease: float = 2.0) -> list[Samples]:
    """Three settings on shared questions; the middle one lies 0.05 above the chord."""
    rates = rng.beta(0.7 * ease, 0.3 * ease, (1, questions, 1)) ** [[[1.0]], [[1.0]], [[3.0]]]
    right = rng.random((3, questions, 4)) < rates
    length = rng.gamma(9, 1 / 9, (1, questions, 1)) * [[[100.0]], [[60.0]], [[20.0]]]
    tokens = length * rng.gamma(9, 1 / 9, (3, questions, 4))
    names = np.repeat(np.arange(questions), 4).tolist()
    return [Samples(names, right[s].ravel(), tokens[s].ravel()) for s in range(3)]


def test_estimates_are_those_of_the_means() -> None:
    settings = _dial(np.random.default_rng(1), 50)
    points = [Point(float(np.mean(s.tokens)), float(np.mean(s.correct))) for s in settings]
    for point, (chord, hull) in zip(points, distance_intervals(settings, (0, 2)), strict=True):
        assert chord is not None
        assert chord.mean == pytest.approx(chord_distance(point, points[0], points[2]))
        assert hull.mean == pytest.approx(hull_distance(point, points))
        assert chord.low <= chord.mean <= chord.high
        assert hull.low <= hull.mean <= hull.high <= 0


def test_unequal_numbers_of_samples_and_their_order_are_allowed_for() -> None:
    full = _dial(np.random.default_rng(2), 20)
    order = np.random.default_rng(3).permutation(80)[:71]
    part = full[1].select(order)
    assert len(set(part.questions)) == 20
    chord = distance_intervals([full[0], part, full[2]], (0, 2))[1].chord
    ends = [Point(float(np.mean(s.tokens)), float(np.mean(s.correct))) for s in full]
    own = Point(float(np.mean(part.tokens)), float(np.mean(part.correct)))
    assert chord is not None
    assert chord.mean == pytest.approx(chord_distance(own, ends[0], ends[2]))


def test_equal_seeds_give_equal_intervals() -> None:
    settings = _dial(np.random.default_rng(4), 30)
    first, again, other = (distance_intervals(settings, (0, 2), seed=s) for s in (0, 0, 1))
    assert first == again != other


def test_the_ends_are_bootstrapped_too() -> None:
    rng = np.random.default_rng(5)
    questions = list(range(200))
    sure = Samples(questions, np.ones(200), np.full(200, 60.0))
    shaky = [Samples(questions, rng.random(200) < 0.5, np.full(200, t)) for t in (100.0, 20.0)]
    [_, chord, _] = [d.chord for d in distance_intervals([shaky[0], sure, shaky[1]], (0, 2))]
    assert chord is not None
    # The chord's middle is the mean of two shares at 0.5: variance 0.25/200/2.
    assert (chord.high - chord.low) / 2 == pytest.approx(1.97 * (0.125 / 200) ** 0.5, rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("questions", [30, 150])
def test_the_chords_interval_covers(questions: int) -> None:
    rng = np.random.default_rng(6)
    population = [np.asarray(s.correct).mean() for s in _dial(rng, 400_000)]
    truth = population[1] - (population[0] + population[2]) / 2
    repeats, covered = 600, 0
    for _ in range(repeats):
        chord = distance_intervals(_dial(rng, questions), (0, 2), repeats=800)[1].chord
        assert chord is not None
        covered += chord.low <= truth <= chord.high
    # 0.95 ± four standard errors, and what few questions and the added doubt cost.
    assert 0.92 <= covered / repeats <= 0.99


def test_agreement_everywhere_is_no_certainty() -> None:
    questions = list(range(100))
    settings = [Samples(questions, np.ones(100), np.full(100, t)) for t in (100.0, 60.0, 20.0)]
    chord = distance_intervals(settings, (0, 2))[1].chord
    assert chord is not None
    assert chord.low < 0 < chord.high
    assert not significantly_above(chord)
    assert not significantly_below(chord)


def test_significance_needs_the_whole_interval() -> None:
    assert significantly_above(Interval(0.01, 0.02, 0.03))
    assert significantly_below(Interval(-0.03, -0.02, -0.01))
    assert not significantly_above(Interval(0.0, 0.02, 0.03))
    assert not significantly_below(Interval(-0.03, -0.02, 0.0))


def test_one_question_or_no_ends() -> None:
    one = Samples("aa", [1, 0], [5, 7])
    [first, _] = distance_intervals([one, one], (0, 1))
    assert (first.chord, first.hull) == (Interval(-1, 0, 1), Interval(-1, 0, 0))
    assert distance_intervals(_dial(np.random.default_rng(7), 5))[0].chord is None


def test_what_cannot_be_compared_is_refused() -> None:
    one, other = Samples("ab", [1, 0], [5, 7]), Samples("ac", [1, 0], [5, 7])
    with pytest.raises(DataError, match="at some settings only"):
        distance_intervals([one, other])
    with pytest.raises(DataError, match="no settings"):
        distance_intervals([])
    with pytest.raises(ConfigError, match="not among the 1"):
        distance_intervals([one], (0, 1))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        distance_intervals([one], confidence=95)


def _point(label: str, tokens: float, accuracy: float) -> ParetoPoint:
    return ParetoPoint(label, "dial", tokens, (tokens - 1, tokens + 1), accuracy, (0.1, 0.9))


def test_every_picture_has_the_chord_and_the_hull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    plot = Axes.plot

    def record(
        self: Axes, x: list[float], y: list[float], *args: object, **kwargs: object
    ) -> object:
        lines[str(kwargs["label"])] = (list(x), list(y))
        return plot(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", record)
    slow, middle, fast = _point("λ=0", 100, 0.8), _point("λ=0.5", 60, 0.75), _point("λ=1", 20, 0.3)
    draw_pareto(tmp_path / "deep" / "p.png", [slow, middle, fast], ends=[(slow, fast)])
    assert lines["chord: a coin between the ends"] == ([100, 20], [0.8, 0.3])
    assert lines["hull of all mixtures"] == ([20, 60, 100, 100], [0.3, 0.75, 0.8, 0.8])
    assert (tmp_path / "deep" / "p.png").stat().st_size > 1000


def test_a_single_point_has_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Axes, "plot", lambda *args, **kwargs: pytest.fail("nothing to join"))
    draw_pareto(tmp_path / "p.png", [_point("λ=0", 10, 0.5)])


def test_the_legend_stands_where_fewer_points_are():
    def points(*places):
        return [
            ParetoPoint(
                str(tokens), "one", tokens, (tokens, tokens), accuracy, (accuracy, accuracy)
            )
            for tokens, accuracy in places
        ]

    assert _free_corner(points((40, 0.9), (60, 0.7), (90, 0.5))) == "upper right"
    assert _free_corner(points((40, 0.5), (60, 0.7), (90, 0.9))) == "lower right"
    assert _free_corner([]) == "lower right"
