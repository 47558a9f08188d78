from pathlib import Path
from typing import Any, Literal

import pytest

from flexalign.errors import ConfigError
from flexalign.training.settings import check_settings, read_yaml, set_value, split_assignment

WANTED: dict[str, Any] = {
    "max_steps": int,
    "learning_rate": float,
    "packing": bool,
    "gate": float | None,
    "names": list[str] | str | None,
    "kind": Literal["a", "b"],
}


def test_numbers_are_read_as_people_write_them() -> None:
    checked = check_settings(
        {"learning_rate": "2e-5", "gate": 1, "max_steps": 7}, WANTED, "training"
    )
    assert checked == {"learning_rate": 2e-5, "gate": 1.0, "max_steps": 7}
    assert isinstance(checked["gate"], float)


def test_none_lists_and_choices_pass() -> None:
    values = {"gate": None, "names": ["q_proj"], "kind": "b"}
    assert check_settings(values, WANTED, "") == values
    assert check_settings({"names": "all"}, WANTED, "") == {"names": "all"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_step", 3, r"unknown key 'training\.max_step'; did you mean 'training\.max_steps'\?"),
        ("max_steps", "ten", r"training\.max_steps must be a whole number, got 'ten'"),
        ("max_steps", True, r"training\.max_steps must be a whole number"),
        ("max_steps", 2.5, r"training\.max_steps must be a whole number"),
        ("packing", "yes please", r"training\.packing must be true or false"),
        ("learning_rate", "fast", r"training\.learning_rate must be a number"),
        ("kind", "c", r"training\.kind must be 'a' or 'b'"),
        ("zzz", 1, "known are max_steps, learning_rate"),
    ],
)
def test_mistakes_are_one_sentence(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings({key: value}, WANTED, "training")


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="max_steps is missing"):
        check_settings({}, WANTED, "", required=["max_steps"])


def test_assignments_are_yaml_and_nest() -> None:
    tree: dict[str, Any] = {"training": {"max_steps": 1}, "lora": None}
    for text in ("training.max_steps=100", "lora.r=8", "training.packing=true", "gate=null"):
        set_value(tree, *split_assignment(text))
    assert tree == {
        "training": {"max_steps": 100, "packing": True},
        "lora": {"r": 8},
        "gate": None,
    }


@pytest.mark.parametrize("text", ["max_steps", "=3", "a=[1"])
def test_malformed_assignments_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        split_assignment(text)


def test_an_assignment_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="output is no mapping"):
        set_value({"output": "out"}, "output.name", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\nb: 2", "is not YAML at line 2"),
        (b"- a\n- b", "must hold `key: value` lines"),
        (b"", "must hold `key: value` lines"),
        (b"a: \xff\xfe", "cannot be read"),
        (None, "is not there"),
    ],
)
def test_files_that_hold_no_mapping_are_refused(tmp_path: Any, content: Any, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_a_number_with_a_colon_is_text_and_not_to_the_base_of_60(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("range: 1:5\nfloat: 1:30.5\nwhole: 1_000\nhex: 0x10\nreal: 2.5\n")
    expected = {"range": "1:5", "float": "1:30.5", "whole": 1000, "hex": 16, "real": 2.5}
    assert read_yaml(path) == expected
    assert split_assignment("lambda=1:5") == ("lambda", "1:5")
    assert split_assignment("steps=20") == ("steps", 20)
