import json
from pathlib import Path

import pytest

from calibration.worlds import QUESTIONS, make_ask
from flexalign.calibration import NonInferiority, Tuned, TuneOptions, select_setting
from flexalign.calibration.card import write_card

CUTS = {"λ=0": 0.0, "λ=1": 0.4, "λ=2": 0.6}


def _tuned(effects: dict[str, float], looks: str = "pocock") -> Tuned:
    options = TuneOptions(samples=4, looks=looks)
    goal = NonInferiority(0.1)
    return select_setting(["λ=1", "λ=2"], make_ask(effects, CUTS), QUESTIONS, goal, options=options)


@pytest.mark.parametrize("looks", ["pocock", "betting"])
def test_the_card_states_promise_both_evidences_and_cost(tmp_path: Path, looks: str):
    tuned = _tuned({"λ=0": 0.0, "λ=1": 0.0, "λ=2": -0.5}, looks)
    write_card(tuned, tmp_path / "out", {"task": "a task"})
    card = (tmp_path / "out" / "tuned.md").read_text(encoding="utf-8")
    result = json.loads((tmp_path / "out" / "tuned.json").read_text(encoding="utf-8"))
    assert "**λ=1**: accuracy no more than 10 points below the reference's" in card
    assert f"{tuned.at_choice['λ=1'].accuracy.mean:.3f}" in card.split("## Evidence on held-out")[0]
    assert f"{tuned.at_proof['λ=1'].accuracy.mean:.3f}" in card.split("## Evidence on held-out")[1]
    assert f"{tuned.samples} samples" in card
    assert "- task: a task" in card
    assert (result["chosen"], result["task"]) == ("λ=1", "a task")
    assert result["samples"]["spent"] == sum(result["samples"]["by_setting"].values())
    assert (tmp_path / "out" / "tuned.png").read_bytes().startswith(b"\x89PNG")


def test_none_has_a_card_too(tmp_path: Path):
    write_card(_tuned({"λ=0": 0.0, "λ=1": -0.5, "λ=2": -0.5}), tmp_path, {})
    card = (tmp_path / "tuned.md").read_text(encoding="utf-8")
    assert "**None of the candidates is promised to keep it**" in card
    assert json.loads((tmp_path / "tuned.json").read_text(encoding="utf-8"))["chosen"] is None
