import itertools
from dataclasses import replace

import numpy as np
import pytest

from flexalign.calibration.effort import (
    AchievedRatio,
    Calibration,
    EffortLevel,
    MeasuredSetting,
    SettingMetrics,
    effort_to_dial,
    known_cut,
    note_on_sampling,
)
from flexalign.errors import ConfigError
from flexalign.lambdas import Adaptive, Fixed
from flexalign.statistics import Interval


def calibration(**changes):
    given = {
        "version": 1,
        "measure": "min_token_probability",
        "holes": [[0.2, 0.6]],
        "effort": {"thresholds": [], "lambdas": [[0.0, 1.0], [100.0, 0.0], [150.0, -0.5]]},
    }
    return Calibration.from_json(given | changes)


def test_lambda_lies_on_straight_lines_between_points():
    assert effort_to_dial(calibration(), 0) == Fixed(1.0)
    assert effort_to_dial(calibration(), 10) == Fixed(0.9)
    assert effort_to_dial(calibration(), 100) == Fixed(0.0)
    assert effort_to_dial(calibration(), 125) == Fixed(-0.25)
    assert calibration().largest_effort == 150


def test_an_effort_in_a_hole_gets_its_nearer_end():
    lams = [effort_to_dial(calibration(), effort).lam for effort in np.arange(0, 150.5, 0.5)]
    assert not any(0.2 < lam < 0.6 for lam in lams)
    assert {0.2, 0.6} <= set(lams)
    assert all(later <= earlier for earlier, later in itertools.pairwise(lams))


def test_thresholds_serve_below_the_reference_and_lambda_from_there():
    effort = {"thresholds": [[0.0, 0.0], [50.0, 0.4], [100.0, 0.9]], "lambdas": [[100.0, 0.0]]}
    given = calibration(effort=effort, holes=[])
    assert effort_to_dial(given, 25) == Adaptive(0.2, measure="min_token_probability")
    assert effort_to_dial(given, 100) == Fixed(0.0)


@pytest.mark.parametrize("effort", [-1, 150.1, float("nan"), True, "50"])
def test_what_lies_outside_is_refused_with_the_range(effort):
    with pytest.raises(ConfigError, match=r"0 \(fastest\) to 150"):
        effort_to_dial(calibration(), effort)


def test_without_a_calibration_the_command_that_makes_one_is_named():
    with pytest.raises(ConfigError, match="run flexalign calibrate"):
        Calibration.from_json(None)


@pytest.mark.parametrize("damage", [{"version": 2}, {"effort": {}}, {"effort": {"lambdas": []}}])
def test_a_calibration_that_cannot_be_read_is_named(damage):
    with pytest.raises(ConfigError, match="run flexalign calibrate again"):
        effort_to_dial(calibration(**damage), 50)


def test_other_sampling_options_than_calibrations_are_named_beside_them():
    known = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": None}
    for same in ({}, known, known | {"temperature": None, "seed": 3, "max_new_tokens": 5}):
        assert note_on_sampling(known, same) is None
    both = note_on_sampling(known, {"temperature": 10**400, "top_p": 1.0})
    assert "at temperature 0.7, top_p 0.95 and is asked for at temperature 1000" in both
    assert "0, top_p 1.0: its tokens" in both
    assert len(both) < 250


ACCURACY = Interval(0.5, 0.6, 0.7)


def metrics(tokens):
    return SettingMetrics(
        Interval(tokens - 5, tokens, tokens + 5), tokens / 2, 2 * tokens, ACCURACY
    )


LEVELS = (
    EffortLevel(
        *(50.0, "adaptive 0.4", 35.0, "simulated", metrics(30.0), Interval(-0.1, 0.0, 0.1)),
        achieved=AchievedRatio(0.1, 0.9, 1.8),
    ),
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


def test_a_level_of_an_earlier_version_has_no_ratio_by_question():
    written = CALIBRATION.to_json()
    names = {"achieved_p10", "achieved_median", "achieved_p90"}
    assert [names & level.keys() for level in written["levels"]] == [names, set()]
    for name in names:
        del written["levels"][0][name]
    first = Calibration.from_json(written).levels[0]
    assert first == replace(LEVELS[0], achieved=None)
