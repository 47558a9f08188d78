from pathlib import Path

import pytest
from matplotlib.axes import Axes

from flexalign.evaluation.frontier import ParetoPoint, draw_pareto


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
