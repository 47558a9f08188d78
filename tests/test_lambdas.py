"""λ as numbers, schedules, policies and settings: every form, what it gives, what is refused."""

import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexalign.errors import ConfigError, LambdaError
from flexalign.lambdas import (
    Adaptive,
    Exit,
    Fixed,
    Ladder,
    LambdaRange,
    Route,
    Schedule,
    Setting,
    extremes,
    parse_any_dial,
    parse_dial,
    parse_training_lambda,
    require_forward,
    unique_settings,
)

LINEAR = {"kind": "linear", "start": -1, "end": 3, "steps": 8}
COSINE = {"kind": "cosine", "start": -1, "end": 3, "steps": 8}
PIECEWISE = {"kind": "piecewise", "points": [[2, 0.5], [4, 1.5], [4, 0.0], [8, 2.0]]}
THINKING = {"kind": "thinking", "think": 0.25, "answer": 1.0}
BUDGET = {**THINKING, "budget": 2000, "end": 1.25}
ALL = (2.0, LINEAR, COSINE, PIECEWISE, THINKING, BUDGET)


def test_a_number_is_that_lambda_at_every_step() -> None:
    for value in (2, "2", 2.0, {"kind": "constant", "start": 2}, {"kind": "constant", "end": 2}):
        schedule = Schedule.parse(value)
        assert [schedule.at(step) for step in (0, 1, 10**9)] == [2.0] * 3
        assert schedule.to_json() == 2.0
        assert schedule.end_value == 2.0


def test_linear_is_a_straight_line_held_at_its_ends() -> None:
    schedule = Schedule.parse(LINEAR)
    assert [schedule.at(step) for step in (-5, 0, 2, 4, 6, 8, 99)] == [-1, -1, 0, 1, 2, 3, 3]
    assert schedule.end_value == 3


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_ends_are_exact_where_rounding_would_miss_them(kind: str) -> None:
    schedule = Schedule(kind, start=-0.9, end=0.3, steps=7)
    assert -0.9 + (0.3 - -0.9) * 1.0 != 0.3
    assert (schedule.at(0), schedule.at(7), schedule.at(8)) == (-0.9, 0.3, 0.3)


def test_cosine_is_half_a_wave() -> None:
    schedule = Schedule.parse(COSINE)
    for step in range(9):
        assert schedule.at(step) == pytest.approx(1 - 2 * math.cos(math.pi * step / 8), abs=1e-12)
    assert (schedule.at(-1), schedule.at(8), schedule.at(99)) == (-1, 3, 3)
    assert schedule.end_value == 3


def test_piecewise_goes_straight_between_points_and_jumps_where_two_share_a_step() -> None:
    schedule = Schedule.parse(PIECEWISE)
    expected = {0: 0.5, 2: 0.5, 3: 1.0, 3.75: 1.375, 4: 0.0, 6: 1.0, 8: 2.0, 50: 2.0}
    assert {step: schedule.at(step) for step in expected} == expected
    assert schedule.end_value == 2
    assert Schedule("piecewise", points=((0, 7),)).at(3) == 7


def test_thinking_has_one_lambda_inside_and_another_outside() -> None:
    schedule = Schedule.parse(THINKING)
    assert schedule.at(9, inside=True, thinking_tokens=9) == 0.25
    assert schedule.at(9, inside=False, thinking_tokens=9) == 1.0
    assert schedule.end_value == 1.0


def test_a_budget_bends_lambda_over_the_thinking_tokens_and_then_holds_it() -> None:
    schedule = Schedule.parse(BUDGET)
    at = {n: schedule.at(n, inside=True, thinking_tokens=n) for n in (0, 500, 1000, 2000, 9000)}
    assert at == {0: 0.25, 500: 0.5, 1000: 0.75, 2000: 1.25, 9000: 1.25}
    assert schedule.at(0, inside=True) == 0.25
    assert schedule.at(5000, thinking_tokens=5000) == 1.0
    assert schedule.end_value == 1.0


def test_only_thinking_asks_where_the_thinking_is() -> None:
    assert [Schedule.parse(form).follows_thinking for form in ALL] == [False] * 4 + [True] * 2
    schedule = Schedule.parse(LINEAR)
    assert schedule.at(2, inside=True, thinking_tokens=5) == schedule.at(2)


@pytest.mark.parametrize("form", ALL, ids=str)
def test_every_form_comes_back_from_json_text_pickle_and_itself(form: object) -> None:
    schedule = Schedule.parse(form)  # type: ignore[arg-type]
    text = json.dumps(schedule.to_json())
    assert json.loads(text) == form
    for again in (Schedule.parse(text), pickle.loads(pickle.dumps(schedule))):
        assert again == schedule
        assert hash(again) == hash(schedule)
    assert Schedule.parse(schedule) is schedule


def test_schedules_that_differ_are_unequal() -> None:
    assert len({Schedule.parse(form) for form in ALL}) == len(ALL)
    assert Schedule.parse({**LINEAR, "steps": 9}) != Schedule.parse(LINEAR)


@given(
    st.one_of(
        st.builds(
            Schedule,
            kind=st.sampled_from(["linear", "cosine"]),
            start=st.floats(-10, 10),
            end=st.floats(-10, 10),
            steps=st.integers(1, 1000),
        ),
        st.lists(st.tuples(st.integers(0, 50), st.floats(-10, 10)), min_size=1).map(
            lambda points: Schedule("piecewise", points=tuple(sorted(points)))
        ),
        st.builds(
            Schedule,
            kind=st.just("thinking"),
            think=st.floats(-10, 10),
            answer=st.floats(-10, 10),
            budget=st.integers(1, 1000),
            end=st.floats(-10, 10),
        ),
    ),
    st.integers(0, 2000),
    st.booleans(),
)
def test_no_lambda_leaves_the_range_of_the_values(
    schedule: Schedule, step: int, inside: bool
) -> None:
    lam = schedule.at(step, inside=inside, thinking_tokens=step)
    assert min(schedule.values) - 1e-12 <= lam <= max(schedule.values) + 1e-12
    assert schedule.end_value in schedule.values


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"kind": "lineer"}, "kind 'lineer' is no schedule; did you mean 'linear'"),
        ({"kind": 3}, "kind 3 is no schedule; known are constant, linear"),
        ({"kind": ["linear"]}, "is no schedule"),
        ({**LINEAR, "step": 3}, "no key 'step'; did you mean 'steps'"),
        ({**LINEAR, 7: 3}, "no key 7"),
        ({"start": 0, "end": 2, "steps": 200}, "needs a 'kind': one of constant, linear"),
        (
            {"kind": "linear", "start": 0, "end": 2},
            "a linear schedule needs 'steps'; it takes start, end, steps",
        ),
        (
            {**COSINE, "points": [[0, 1]]},
            "a cosine schedule takes no 'points'; it takes start, end, steps",
        ),
        ({"kind": "constant"}, "a constant schedule needs 'start'"),
        ({"kind": "constant", "start": 1, "end": 2}, "one λ, got start 1.0 and end 2.0"),
        ({**LINEAR, "steps": 0}, "steps must be a whole number ≥ 1, got 0"),
        ({**LINEAR, "steps": 2.5}, "steps must be a whole number ≥ 1, got 2.5"),
        ({**LINEAR, "steps": True}, "steps must be a whole number ≥ 1, got True"),
        ({**LINEAR, "steps": "8"}, "steps must be a whole number ≥ 1, got '8'"),
        ({**BUDGET, "budget": math.nan}, "budget must be a whole number ≥ 1, got nan"),
        ({**THINKING, "budget": 10}, "takes 'budget' and 'end' together"),
        ({**THINKING, "end": 1.0}, "takes 'budget' and 'end' together"),
        ({"kind": "thinking", "think": 1.0}, "a thinking schedule needs 'answer'"),
        ({"kind": "piecewise", "points": []}, r"points must be pairs \[step, λ\]"),
        ({"kind": "piecewise", "points": 3}, r"^points must be pairs \[step, λ\].*; got 3\.$"),
        ({"kind": "piecewise", "points": [[0, 1, 2]]}, r"got \[0, 1, 2\] among them"),
        ({"kind": "piecewise", "points": [[-1, 2]]}, "the step -1 is not a number ≥ 0"),
        ({"kind": "piecewise", "points": [[math.inf, 2]]}, "the step inf is not a number"),
        ({"kind": "piecewise", "points": [[True, 2]]}, "the step True is not a number"),
        ({"kind": "piecewise", "points": [[5, 1], [4, 2]]}, "step 4 comes after 5"),
        ("fast", "a number or a JSON object, got 'fast'"),
        ('{"kind": ', "a number or a JSON object"),
    ],
)
def test_a_malformed_schedule_is_refused_by_its_key(form: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule.parse(form)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (math.nan, "lambda must be a finite number"),
        ("Infinity", "lambda must be a finite number"),
        (10**400, "lambda must be a finite number"),
        (True, "got True"),
        (None, "got None"),
        ([1, 2], r"got \[1, 2\]"),
        ({**LINEAR, "end": math.inf}, "end must be a finite number"),
        ({**LINEAR, "start": "0"}, "start must be a finite number"),
        ({**THINKING, "think": False}, "think must be a finite number"),
        ({"kind": "piecewise", "points": [[3, math.nan]]}, "points at step 3 must be a finite"),
    ],
)
def test_a_lambda_that_is_no_finite_number_is_refused_by_its_place(
    form: object, message: str
) -> None:
    with pytest.raises(LambdaError, match=message):
        Schedule.parse(form)  # type: ignore[arg-type]


def test_the_largest_lambda_is_the_largest_float32() -> None:
    assert Schedule.parse(torch.finfo(torch.float32).max).at(0) == torch.finfo(torch.float32).max
    with pytest.raises(LambdaError, match="finite"):
        Schedule.parse(math.nextafter(torch.finfo(torch.float32).max, math.inf))


@pytest.mark.parametrize(
    "module", ["flexalign.lambdas", "flexalign.evaluation.systems", "flexalign.systems"]
)
def test_what_reads_a_dial_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Every JSON form of a dial, and what is refused.


THINKING_DIAL = {"kind": "thinking", "think": 0.0, "answer": 1.0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.5, Fixed(0.5)),
        (2, Fixed(2.0)),
        ("-0.5", Fixed(-0.5)),
        ({"policy": "fixed", "lambda": 0.5}, Fixed(0.5)),
        ({"policy": "fixed", "lam": 0.5}, Fixed(0.5)),
        ('{"policy": "fixed", "lambda": 3}', Fixed(3.0)),
        (Fixed(1), Fixed(1.0)),
        ("adaptive 0.3", Adaptive(0.3)),
        ("route 0.3", Route(0.3)),
        ("auto", Adaptive()),
        ("exit", Exit()),
        ("exit 0.9", Exit(0.9)),
        ({"policy": "exit"}, Exit(0.95, "answer_probability", "\n\n", 64, 1.0, 0.0)),
        (
            {"policy": "exit", "threshold": 0, "marker": ";", "answer_tokens": 9, "fast_lambda": 2},
            Exit(0.0, marker=";", answer_tokens=9, fast_lambda=2.0),
        ),
        ({"policy": "adaptive"}, Adaptive()),
        ('{"policy": "adaptive", "threshold": 1}', Adaptive(1.0)),
        (
            {"policy": "adaptive", "measure": "agreement", "samples": 3, "slow_lambda": -0.5},
            Adaptive(measure="agreement", samples=3, slow_lambda=-0.5),
        ),
        ({"policy": "route", "share": 0.3, "fast_lambda": 2}, Route(0.3, 2.0)),
        (Route(0), Route(0.0, 1.0, 0.0)),
        (THINKING_DIAL, Schedule.parse(THINKING_DIAL)),
        (Schedule.parse(THINKING_DIAL), Schedule.parse(THINKING_DIAL)),
    ],
    ids=str,
)
def test_forms(given, expected):
    assert parse_dial(given) == expected
    assert parse_dial(expected.to_json()) == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (float("nan"), LambdaError, "finite"),
        (True, LambdaError, "lambda must be a finite number"),
        (None, LambdaError, "None"),
        (10**400, LambdaError, "finite"),
        ("half", ConfigError, "'half'"),
        ({"policy": "fixd"}, ConfigError, "did you mean 'fixed'"),
        ({"policy": ["fixed"], "lambda": 1}, ConfigError, "no policy"),
        ({"policy": "fixed"}, ConfigError, "takes one λ"),
        ({"policy": "fixed", "lambda": 1, "lam": 2}, ConfigError, "takes one λ"),
        ({"policy": "fixed", "lamda": 1}, ConfigError, "did you mean 'lambda'"),
        ({"policy": "fixed", "lambda": "1"}, LambdaError, r"finite number \(a λ\), got '1'"),
        ({"policy": "adaptive", "treshold": 1}, ConfigError, "did you mean 'threshold'"),
        ({"policy": "adaptive", "threshold": 1.5}, ConfigError, r"in \[0, 1\], got 1.5"),
        ({"policy": "adaptive", "threshold": True}, ConfigError, r"in \[0, 1\], got True"),
        (
            {"policy": "adaptive", "measure": "agrement"},
            ConfigError,
            r"did you mean 'agreement'\?$",
        ),
        (
            {"policy": "adaptive", "samples": 0},
            ConfigError,
            "samples must be a whole number ≥ 1, got 0",
        ),
        (
            {"policy": "adaptive", "slow_lambda": float("inf")},
            LambdaError,
            "slow_lambda must be a finite number",
        ),
        (1e39, LambdaError, "finite"),
        ({"policy": "exit", "makrer": ";"}, ConfigError, "did you mean 'marker'"),
        ({"policy": "exit", "threshold": -1}, ConfigError, r"exit .* in \[0, 1\], got -1"),
        ({"policy": "exit", "marker": ""}, ConfigError, "a text that is not empty, got ''"),
        ({"policy": "exit", "answer_tokens": 0}, ConfigError, "answer_tokens must be a whole"),
        ({"policy": "exit", "measure": "sure"}, ConfigError, "no measure"),
        (
            {"policy": "exit", "slow_lambda": {"kind": "thinking", "think": 0, "answer": 1}},
            LambdaError,
            "slow_lambda must be a finite number",
        ),
        ({"policy": "route"}, ConfigError, "needs a share"),
        ({"policy": "route", "share": float("nan")}, ConfigError, r"in \[0, 1\], got nan"),
        ({"policy": "route", "share": "half"}, ConfigError, r"in \[0, 1\], got 'half'"),
        ({"kind": "linea"}, ConfigError, "did you mean 'linear'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(given, error, message):
    with pytest.raises(error, match=message):
        parse_dial(given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ladder 0.9,0.6", Ladder((0.9, 0.6), (1.0, 0.5, 0.0))),
        ("ladder 0.5", Ladder((0.5,), (1.0, 0.0))),
        (
            {"policy": "ladder", "thresholds": [1, 0], "lambdas": [0, 2, -0.5]},
            Ladder((1.0, 0.0), (0.0, 2.0, -0.5)),
        ),
        (
            '{"policy": "ladder", "thresholds": [0.9], "measure": "agreement", "samples": 3}',
            Ladder((0.9,), measure="agreement", samples=3),
        ),
    ],
    ids=str,
)
def test_forms_of_a_ladder(given: object, expected: Ladder) -> None:
    assert parse_any_dial(given) == expected
    assert parse_any_dial(expected.to_json()) == expected
    assert json.loads(json.dumps(expected.to_json())) == expected.to_json()
    with pytest.raises(ConfigError, match="interpolate:REF,ALIGNED alone has; measure"):
        parse_dial(given)


def test_the_lambdas_of_a_ladder_are_in_equal_steps() -> None:
    assert Ladder((0.9, 0.6, 0.3)).lambdas == (1.0, 1 - 1 / 3, 1 - 2 / 3, 0.0)
    assert Ladder((0.9, 0.6)).to_json() == {"policy": "ladder", "thresholds": [0.9, 0.6]}
    assert extremes(Ladder((0.9, 0.6), (1, 2.5, -1))) == (-1.0, 2.5)


def test_a_ladder_chooses_by_the_thresholds_that_are_not_reached() -> None:
    ladder = Ladder((0.9, 0.6, 0.0), (2, 1, 0.5, 0))
    chosen = {one: ladder.next_lambda(one) for one in (1.0, 0.9, 0.89, 0.6, 0.59, 0.0, None)}
    assert chosen == {1.0: None, 0.9: None, 0.89: 1, 0.6: 1, 0.59: 0.5, 0.0: 0.5, None: 0}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("ladder", ConfigError, "needs thresholds"),
        ("ladder 0.9,half", ConfigError, "'0.9,half' is not numbers with commas between"),
        ({"policy": "ladder", "thresholds": 0.9}, ConfigError, r"numbers in \[0, 1\], such as"),
        ({"policy": "ladder", "thresholds": []}, ConfigError, r"numbers in \[0, 1\], such as"),
        ({"policy": "ladder", "thresholds": [1.5]}, ConfigError, r"in \[0, 1\], got 1.5"),
        ("ladder 0.6,0.9", ConfigError, "must descend, got 0.6,0.9"),
        ("ladder 0.6,0.6", ConfigError, "must descend"),
        (
            {"policy": "ladder", "thresholds": [0.9], "lambdas": [1]},
            ConfigError,
            "must be 2 different ones, one more than its thresholds, got 1",
        ),
        (
            {"policy": "ladder", "thresholds": [0.9], "lambdas": [1, 1]},
            ConfigError,
            "2 different ones",
        ),
        (
            {"policy": "ladder", "thresholds": [0.9], "lambdas": [1, float("nan")]},
            LambdaError,
            "must be a finite number",
        ),
        ({"policy": "ladder", "thresholds": [0.9], "lambdas": 1}, ConfigError, "must be a list"),
        ({"policy": "ladder", "threshold": [0.9]}, ConfigError, "did you mean 'thresholds'"),
        (
            {"policy": "ladder", "thresholds": [0.9], "measure": "sure"},
            ConfigError,
            "no measure",
        ),
        ({"policy": "ladder", "thresholds": [0.9], "samples": 0}, ConfigError, "ladder's samples"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_ladders(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_any_dial(given)


def test_a_route_goes_the_slow_way_as_often_as_its_share_says():
    generator = torch.Generator().manual_seed(0)
    ways = [Route(0.3).draw(generator) for _ in range(2000)]
    assert abs(ways.count("slow") - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5
    again = torch.Generator().manual_seed(0)
    assert ways == [Route(0.3).draw(again) for _ in range(2000)]
    assert {Route(0).draw() for _ in range(20)} == {"fast"}
    assert {Route(1).draw() for _ in range(20)} == {"slow"}


# The names of dials.


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0.5, "λ=0.5"),
        (-0.0, "λ=0"),
        ({"policy": "fixed", "lambda": 2}, "λ=2"),
        ({"policy": "adaptive", "threshold": 0.5}, "adaptive 0.5"),
        ("auto", "adaptive"),
        (
            {"policy": "adaptive", "threshold": 0.5, "measure": "agreement"},
            "adaptive 0.5 measure=agreement",
        ),
        ({"policy": "route", "share": 0.25}, "route 0.25"),
        ("exit 0.9", "exit 0.9"),
        ({"policy": "exit", "marker": ";"}, "exit marker=;"),
        ({"policy": "exit", "threshold": 0.9, "marker": "\n"}, 'exit 0.9 marker="\\n"'),
        ("ladder 0.90,0.6", "ladder 0.9,0.6"),
        (
            {"policy": "ladder", "thresholds": [0.9], "lambdas": [1.5, 0], "measure": "agreement"},
            "ladder 0.9 lambdas=1.5,0 measure=agreement",
        ),
    ],
)
def test_a_dial_has_one_name(value: object, name: str) -> None:
    assert Setting.of(value).id == name


def test_a_setting_knows_its_json_form() -> None:
    assert (Setting.of(0.5).lam, Setting.of(0.5).policy) == (0.5, None)
    thinking = Setting.of('{"kind": "thinking", "think": 0, "answer": 1}')
    assert thinking.lam is None
    assert Setting.of(thinking.policy) == thinking
    assert Setting.of(thinking.id) == thinking


def test_a_setting_is_given_once() -> None:
    with pytest.raises(ConfigError, match="λ=1 is given twice"):
        unique_settings([1, 0, 1.0])


@pytest.mark.parametrize(
    "value", [{"low": -1, "high": 2}, "-1:2", " -1 : 2.0", '{"low": -1, "high": 2}']
)
def test_a_range_has_one_value_in_every_form(value: object) -> None:
    found = parse_training_lambda(value)
    assert found == LambdaRange(-1, 2)
    assert parse_training_lambda(found) is found
    assert parse_training_lambda(found.to_json()) == parse_training_lambda(str(found)) == found
    assert pickle.loads(pickle.dumps(found)) == found
    assert extremes(found) == (-1.0, 2.0)
    assert [found.at(share) for share in (0, 0.5, 1)] == [-1.0, 0.5, 2.0]


def test_what_is_no_range_is_read_as_before() -> None:
    for value in (2.0, LINEAR, "2", json.dumps(COSINE), Fixed(0.5)):
        assert isinstance(parse_training_lambda(value), Schedule)
    assert parse_training_lambda(Fixed(0.5)).to_json() == 0.5


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0, 5, (0, 1, 2.5, 5)), (-1, 2, (-1, 0, 0.5, 1, 2)), (2, 3, (2, 2.5, 3)), (0, 2, (0, 1, 2))],
)
def test_the_marks_of_a_range_hold_its_ends_its_middle_and_the_pair(
    low: float, high: float, marks: tuple[float, ...]
) -> None:
    assert LambdaRange(low, high).marks == marks


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("5:0", LambdaError, "low 5 and high 0"),
        ("2:2", LambdaError, "for one λ write the number alone"),
        ("0:nan", LambdaError, "high must be a finite number"),
        ("0:1:2", LambdaError, "write LOW:HIGH"),
        ({"low": 0}, ConfigError, "needs 'high'"),
        ({"low": 0, "hihg": 1}, ConfigError, "did you mean 'high'"),
        ({"low": True, "high": 2}, LambdaError, "low must be a finite number"),
        ({"low": 0, "high": 1, "kind": "linear"}, ConfigError, "no key 'kind'"),
    ],
)
def test_what_a_range_cannot_be(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_training_lambda(value)


def test_a_range_below_0_leads_away_from_the_alignment() -> None:
    require_forward([("0:5", LambdaRange(0, 5))], "…")
    with pytest.raises(LambdaError, match="leads away"):
        require_forward([("-1:2", LambdaRange(-1, 2))], "…")
