"""The names of dials."""

import pytest

from flexalign.errors import ConfigError
from flexalign.lambdas import Setting, unique_settings


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
