"""Every JSON form of a dial, and what is refused."""

import pytest
import torch

from flexalign.errors import ConfigError, LambdaError
from flexalign.lambdas import Adaptive, Fixed, Route, Schedule, parse_dial

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
        ("adaptive 0.3", Adaptive(0.3)),
        ("route 0.3", Route(0.3)),
        ("auto", Adaptive()),
        ({"policy": "adaptive"}, Adaptive()),
        ('{"policy": "adaptive", "threshold": 1}', Adaptive(1.0)),
        (
            {"policy": "adaptive", "measure": "agreement", "samples": 3, "slow_lambda": -0.5},
            Adaptive(measure="agreement", samples=3, slow_lambda=-0.5),
        ),
        ({"policy": "route", "share": 0.3, "fast_lambda": 2}, Route(0.3, 2.0)),
        (Route(0), Route(0.0, 1.0, 0.0)),
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


def test_a_route_goes_the_slow_way_as_often_as_its_share_says():
    generator = torch.Generator().manual_seed(0)
    ways = [Route(0.3).draw(generator) for _ in range(2000)]
    assert abs(ways.count("slow") - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5
    again = torch.Generator().manual_seed(0)
    assert ways == [Route(0.3).draw(again) for _ in range(2000)]
    assert {Route(0).draw() for _ in range(20)} == {"fast"}
    assert {Route(1).draw() for _ in range(20)} == {"slow"}
