"""``flexalign demo``: what a person reads of its figures; that it runs has tests/end_to_end."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def interval(mean: float, low: float, high: float) -> SimpleNamespace:
    return SimpleNamespace(mean=mean, low=low, high=high)


def measured(name: str, accuracy: float, tokens: float, again: float) -> SimpleNamespace:
    """A model, for which the closed form gives a little less of everything."""
    return SimpleNamespace(
        name=name,
        accuracy=accuracy,
        accuracy_interval=(accuracy - 0.02, accuracy + 0.02),
        tokens=tokens,
        expected=SimpleNamespace(accuracy=accuracy - 0.001, tokens=tokens - 0.1),
        habits=SimpleNamespace(again=again),
        expected_habits=SimpleNamespace(again=again - 0.001),
        to_json=lambda: {"name": name},
    )


def dialled(name: str, accuracy: float, tokens: float, over: float) -> SimpleNamespace:
    worth = SimpleNamespace(
        accuracy=interval(accuracy, accuracy - 0.02, accuracy + 0.02),
        tokens=interval(tokens, tokens - 1, tokens + 1),
        over_coin=interval(over, over - 0.01, over + 0.01),
    )
    return SimpleNamespace(name=name, figures=worth, to_json=lambda: {"name": name})


@pytest.fixture
def demo(
    run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Any]:
    def run_demo(
        output: Path, *, questions: int, steps: int, seed: int, progress: Callable[..., None]
    ) -> Any:
        progress("reference: answers", 0, questions)
        assert output.is_dir()
        assert (questions, steps, seed) == (20, 3, 5)
        models = [measured("reference", 0.8, 40.0, 0.3), measured("student λ=2", 0.85, 30.0, 0.1)]
        return models, [dialled("λ=0", 0.8, 40.0, 0.0), dialled("adaptive", 0.78, 10.0, 0.2)]

    monkeypatch.setattr("flexalign.miniature.demo.run_demo", run_demo)

    def run(*options: object) -> Any:
        asked = ("--questions", 20, "--steps", 3, "--seed", 5, *options)
        return run_cli("demo", "--output", tmp_path / "demo", *asked)

    return run


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_models_and_settings_stand_beside_what_they_are_held_against(
    demo: Callable[..., Any], tmp_path: Path
) -> None:
    result = demo()
    assert result.exit_code == 0, result.stderr
    shown = rows(result.stdout)
    assert "student λ=2 0.850 [0.83, 0.87] 0.849 30.0 29.9 25% 0.100 0.099" in shown
    assert "adaptive 0.780 [0.76, 0.80] 10.0 75% +0.200 [+0.19, +0.21]" in shown
    assert "eq. 5: what equation 5 gives in closed form" in result.stdout
    assert f"figures: {tmp_path / 'demo' / 'demo.json'}" in result.stderr


def test_as_json_the_figures_stand_alone(demo: Callable[..., Any]) -> None:
    found = json.loads(demo("--json").stdout)
    assert [row["name"] for row in found["rows"]] == ["reference", "student λ=2"]
    assert [row["name"] for row in found["dial"]] == ["λ=0", "adaptive"]


def test_a_file_is_no_folder_for_pictures(demo: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine")
    result = demo()
    assert result.exit_code == 2
    assert "is a file; name a folder" in result.stderr
    assert (tmp_path / "demo").read_text() == "mine"
