"""Every JSON form of a dial, and what is refused."""

import pytest

from flexalign.errors import ConfigError, LambdaError
from flexalign.policies import Fixed, parse_dial
from flexalign.schedules import Schedule

THINKING = {"kind": "thinking", "think": 0.0, "answer": 1.0}


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
        (THINKING, Schedule.parse(THINKING)),
        (Schedule.parse(THINKING), Schedule.parse(THINKING)),
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
        (True, LambdaError, "real number"),
        (None, LambdaError, "None"),
        (10**400, LambdaError, "finite"),
        ("half", ConfigError, "'half'"),
        ({"policy": "fixd"}, ConfigError, "did you mean 'fixed'"),
        ({"policy": ["fixed"], "lambda": 1}, ConfigError, "no policy"),
        ({"policy": "fixed"}, ConfigError, "takes one λ"),
        ({"policy": "fixed", "lambda": 1, "lam": 2}, ConfigError, "takes one λ"),
        ({"policy": "fixed", "lamda": 1}, ConfigError, "did you mean 'lambda'"),
        ({"policy": "fixed", "lambda": "1"}, LambdaError, "real number"),
        ({"kind": "linea"}, ConfigError, "did you mean 'linear'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(given, error, message):
    with pytest.raises(error, match=message):
        parse_dial(given)
