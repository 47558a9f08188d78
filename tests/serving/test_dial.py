"""Which dials a server takes, and what it says of them."""

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from counting import count_lambda
from flexalign.errors import ConfigError
from flexalign.inra import InRaConfig
from flexalign.lambdas import Adaptive, Fixed, Route, Schedule
from flexalign.miniature import folder
from flexalign.serving.dial import EFFORT_LEVELS, DialRules, adapter_rules
from flexalign.serving.errors import ApiError


def halves(effort: float) -> Fixed:
    """A calibration in which effort 100 is λ = 0 and effort 0 is λ = 1."""
    if effort > 150:
        raise ConfigError("beyond what was calibrated")
    return Fixed(1 - effort / 100)


PLAIN = DialRules(None)
UNCALIBRATED = DialRules(Fixed(0.25), (-1.0, 2.0))
CALIBRATED = DialRules(Fixed(0.25), (-0.5, 1.0), effort=halves, holes=((0.5, 0.7),))


@pytest.mark.parametrize(
    ("body", "dial"),
    [
        ({}, Fixed(0.25)),
        ({"lambda": None}, Fixed(0.25)),
        ({"lambda": 0.5}, Fixed(0.5)),
        ({"control": 2}, Fixed(2.0)),
        ({"lambda": "auto"}, Adaptive()),
        ({"lambda": {"policy": "route", "share": 0.3}}, Route(0.3)),
        (
            {"lambda": {"kind": "thinking", "think": 0, "answer": 1}},
            Schedule("thinking", think=0, answer=1),
        ),
    ],
)
def test_a_dial_is_read_and_taken_out(body: dict[str, Any], dial: object):
    body["messages"] = "kept"
    choice = UNCALIBRATED.choose(body)
    assert choice.dial == dial
    assert body == {"messages": "kept"}
    assert choice.ignored == ()


@pytest.mark.parametrize(
    ("value", "parses"), [(0.375, 0), ({"policy": "fixed", "lambda": 0.375}, 1)], ids=str
)
def test_a_body_is_parsed_once_and_its_range_checked_once(
    monkeypatch: pytest.MonkeyPatch, value: object, parses: int
):
    counts = count_lambda(monkeypatch, 0.375)
    assert UNCALIBRATED.choose({"lambda": value}).dial == Fixed(0.375)
    counts["dials"] -= 1  # the one that it is compared with
    counts["numbers"] -= 1
    assert counts == Counter(dials=1, numbers=1, ranges=1, parses=parses)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"lambda": True}, "lambda", "finite number"),
        ({"lambda": "0.5"}, "lambda", "auto"),
        ({"lambda": [0.5]}, "lambda", "finite number"),
        ({"lambda": float("nan")}, "lambda", "finite"),
        ({"lambda": float("inf")}, "lambda", "finite"),
        ({"lambda": 10**400}, "lambda", "finite"),
        ({"lambda": 2.01}, "lambda", r"\[-1, 2\]"),
        ({"control": -1.5}, "control", r"\[-1, 2\]"),
        ({"lambda": {"kind": "linear", "start": 0, "end": 9, "steps": 5}}, "lambda", "9"),
        ({"lambda": {"policy": "adaptive", "fast_lambda": 3}}, "lambda", "3"),
        ({"lambda": {"policy": "adaptive", "treshold": 0.5}}, "lambda", "threshold"),
        ({"lambda": {"policy": "rout"}}, "lambda", "route"),
        (
            {"lambda": {"policy": "ladder", "thresholds": [0.9]}},
            "lambda",
            "interpolate:REF,ALIGNED",
        ),
        ({"lambda": {"kind": "cubic"}}, "lambda", "cubic"),
        ({"lambda": {}}, "lambda", "kind"),
        ({"lambda": 0, "control": 0}, "control", "2 dials"),
        ({"lambda": 0, "effort": 5}, "effort", "2 dials"),
        ({"effort": 50}, "effort", "not calibrated"),
        ({"lamda": 0.5}, "lamda", "'lambda'"),
        ({"Lambda": 0.5}, "Lambda", "'lambda'"),
        ({"lam": 0.5}, "lam", "'lambda'"),
        ({"efort": 5}, "efort", "'effort'"),
        ({"reasoning_efort": "low"}, "reasoning_efort", "'reasoning_effort'"),
        ({"contol": 1}, "contol", "'control'"),
        ({"lambda": 2.0000001}, "lambda", r"λ = 2\.0000001 is outside"),
        ({"extra_body": {"lambda": 1}}, "extra_body", "beside the messages"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "'reasoning_effort'"),
    ],
)
def test_what_is_no_dial_is_refused(body: dict[str, Any], param: str, says: str):
    with pytest.raises(ApiError, match=says) as caught:
        UNCALIBRATED.choose(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_levels_are_efforts_and_the_largest_is_the_end_of_the_range():
    chosen = {level: CALIBRATED.choose({"reasoning_effort": level}).dial for level in EFFORT_LEVELS}
    expected = {"none": 1.0, "minimal": 0.9, "low": 0.75, "medium": 0.5, "high": 0.25, "xhigh": 0.0}
    assert chosen == {name: Fixed(lam) for name, lam in expected.items()} | {"max": Fixed(-0.5)}
    assert CALIBRATED.choose({"effort": 125}).dial == Fixed(-0.25)


@pytest.mark.parametrize("effort", [True, "50", -1, float("nan"), float("inf"), 160, {}])
def test_an_effort_that_is_none_is_refused(effort: Any):
    with pytest.raises(ApiError) as caught:
        CALIBRATED.choose({"effort": effort})
    assert caught.value.param == "effort"


def test_a_level_that_is_none_is_refused():
    with pytest.raises(ApiError, match="one of none, minimal"):
        CALIBRATED.choose({"reasoning_effort": "lots"})


def test_before_calibration_a_level_is_no_dial():
    choice = UNCALIBRATED.choose({"reasoning_effort": "low", "lambda": 1})
    assert (choice.dial, choice.ignored) == (Fixed(1.0), ("reasoning_effort",))


def test_a_model_without_a_dial_says_so():
    assert PLAIN.choose({}).report == {}
    assert PLAIN.choose({"reasoning_effort": "low"}).ignored == ("reasoning_effort",)
    with pytest.raises(ApiError, match="no dial"):
        PLAIN.choose({"lambda": 0})


def test_the_report_says_what_was_chosen():
    fixed = {"lambda": 0.3, "policy": "fixed", "route": None}
    assert CALIBRATED.choose({"lambda": 0.3}).report == fixed
    assert CALIBRATED.choose({"effort": 100}).report == fixed | {"lambda": 0.0, "effort": 100}
    assert CALIBRATED.choose({"lambda": "auto"}).report["policy"] == "adaptive"
    assert "worse" in CALIBRATED.choose({"lambda": 0.6}).report["note"]
    assert "note" not in CALIBRATED.choose({"lambda": 0.7}).report


def test_another_temperature_than_calibrations_is_noted_once(caplog: pytest.LogCaptureFixture):
    rules = DialRules(Fixed(0.0), effort=halves, sampling={"temperature": 0.6, "top_p": 1.0})
    with caplog.at_level(logging.WARNING, "flexalign.serving"):
        rules.choose({"effort": 50, "temperature": 0.6, "max_tokens": 9})
        rules.choose({"effort": 50, "temperature": "1"})  # refused elsewhere
        rules.choose({"lambda": 0.5, "temperature": 1})
        assert caplog.records == []
        rules.choose({"effort": 50, "temperature": 1, "top_p": 1})
        rules.choose({"reasoning_effort": "low", "temperature": 0})
    assert [record.message for record in caplog.records] == [
        "effort was calibrated at temperature 0.6 and is asked for at temperature 1: its tokens "
        "and its accuracy may differ from what calibration measured."
    ]


def test_an_adapters_rules_know_what_its_calibration_sampled_with():
    calibration = {
        "version": 1,
        "holes": [],
        "effort": {"thresholds": [], "lambdas": [[0.0, 1.0], [100.0, 0.0]]},
        "sampling": {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 9, "seed": 0},
    }
    settings = replace(InRaConfig.load(folder("fast")), calibration=calibration)
    assert adapter_rules(settings).sampling == {"temperature": 0.7, "top_p": 0.95}
    limited = {**calibration, "sampling": {"temperature": 0.6, "top_k": 20, "seed": 0}}
    rules = adapter_rules(replace(settings, calibration=limited))
    assert rules.sampling == {"temperature": 0.6, "top_k": 20}
    bare = replace(settings, calibration={**calibration, "sampling": {}})
    assert adapter_rules(bare).sampling == {}


def test_a_request_without_a_temperature_is_sampled_at_1(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "flexalign.serving"):
        calibrated = {"temperature": 1, "top_p": 1.0}
        DialRules(Fixed(0.0), effort=halves, sampling=calibrated).choose({"effort": 50})
        assert caplog.records == []
        calibrated = {"temperature": 0.6}
        DialRules(Fixed(0.0), effort=halves, sampling=calibrated).choose({"effort": 50})
    assert "calibrated at temperature 0.6 and is asked for at temperature 1:" in caplog.text
