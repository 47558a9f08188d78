import pytest

from flexalign.calibration.effort import (
    Calibration,
    EffortLevel,
    MeasuredSetting,
    SettingMetrics,
    known_cut,
)
from flexalign.statistics import Interval

ACCURACY = Interval(0.5, 0.6, 0.7)


def metrics(tokens):
    return SettingMetrics(
        Interval(tokens - 5, tokens, tokens + 5), tokens / 2, 2 * tokens, ACCURACY
    )


LEVELS = (
    EffortLevel(50.0, "adaptive 0.4", 35.0, "simulated", metrics(30.0), Interval(-0.1, 0.0, 0.1)),
    EffortLevel(100.0, "λ=0", 70.0, "interpolated", metrics(70.0), Interval(0.0, 0.0, 0.0)),
)
SETTINGS = tuple(
    MeasuredSetting(setting, metrics(tokens))
    for setting, tokens in (("λ=0", 60.0), ("λ=0.5", 45.0), ("λ=-1", 90.0))
)
CALIBRATION = Calibration(((100.0, 0.0),), levels=LEVELS, settings=SETTINGS)


@pytest.mark.parametrize(
    ("setting", "cut"),
    [
        ("adaptive 0.4", (0.5, "simulated")),
        ("λ=0.5", (0.25, "measured")),
        ("λ=-1", (-0.5, "measured")),
        ("λ=0", None),
        ("λ=0.7", None),
    ],
)
def test_a_cut_is_against_the_measured_reference(setting, cut):
    assert known_cut(CALIBRATION, setting) == cut


@pytest.mark.parametrize(
    "calibration",
    [None, Calibration(((100.0, 0.0),)), Calibration(((100.0, 0.0),), levels=LEVELS[:1])],
)
def test_nothing_is_known_where_nothing_was_measured(calibration):
    assert known_cut(calibration, "adaptive 0.4") is None


def test_a_calibration_is_read_as_it_was_written():
    assert Calibration.from_json(CALIBRATION.to_json()) == CALIBRATION
