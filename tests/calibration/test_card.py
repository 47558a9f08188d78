import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from calibration.worlds import QUESTIONS, make_ask
from flexalign.calibration import NonInferiority, Tuned, TuneOptions, select_setting
from flexalign.calibration.card import add_calibration, write_card
from flexalign.calibration.effort import Calibration, EffortLevel, SettingMetrics
from flexalign.statistics import Interval

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


CARD_OF_TRAINING = """---
library_name: flexalign
tags:
- flexalign
model-index:
- name: fast
  results:
  - task:
      type: text-generation
    dataset:
      type: held-out
      name: held-out.jsonl, its first 8 prompts
    metrics:
    - type: tokens
      value: 12.5
      name: tokens per answer
---

# A dial

## Use

```python
model
```
"""


def _level(effort, tokens, accuracy):
    metrics = SettingMetrics(
        Interval(tokens - 1, tokens, tokens + 1), 4, 21, Interval(0.5, accuracy, 0.9)
    )
    return EffortLevel(
        effort, f"λ={1 - effort / 100:g}", tokens, "measured", metrics, metrics.accuracy
    )


def test_the_card_of_a_dial_gets_its_last_calibration(tmp_path):
    (tmp_path / "README.md").write_text(CARD_OF_TRAINING)
    first = Calibration(
        ((100.0, 0.0),), task="math500", questions=40, levels=(_level(50, 30.0, 0.75),)
    )
    assert add_calibration(tmp_path, first)
    second = replace(first, questions=80, levels=(_level(0, 10.0, 0.625), _level(100, 40.0, 0.875)))
    assert add_calibration(tmp_path, second)

    card = ModelCard.load(tmp_path / "README.md")
    found = [
        (one.dataset_name, one.metric_type, one.metric_value, one.metric_args)
        for one in card.data.eval_results
    ]
    questions = "math500, 80 questions"
    assert found == [
        ("held-out.jsonl, its first 8 prompts", "tokens", 12.5, None),
        (questions, "accuracy", 0.625, {"effort": 0}),
        (questions, "tokens", 10.0, {"effort": 0}),
        (questions, "accuracy", 0.875, {"effort": 100}),
        (questions, "tokens", 40.0, {"effort": 100}),
    ]
    assert card.data.tags == ["flexalign"]
    assert card.text.count("## Calibrated") == 1
    assert "| 100 | λ=0 | 40.0 | 4 to 21 | 0.875 [0.500, 0.900] |" in card.text
    assert "## Use\n\n```python\nmodel\n```" in card.text


def test_a_section_that_follows_the_calibration_stays(tmp_path):
    (tmp_path / "README.md").write_text(CARD_OF_TRAINING)
    calibration = Calibration(((100.0, 0.0),), task="math500", questions=40)
    add_calibration(tmp_path, calibration)
    with (tmp_path / "README.md").open("a") as file:
        file.write("\n## My notes\n\nmine\n")
    add_calibration(tmp_path, calibration)
    text = (tmp_path / "README.md").read_text()
    assert text.count("## My notes\n\nmine") == text.count("## Calibrated") == 1


def test_a_dial_without_a_card_gets_none(tmp_path):
    assert not add_calibration(tmp_path, Calibration(((100.0, 0.0),)))
    assert list(tmp_path.iterdir()) == []
