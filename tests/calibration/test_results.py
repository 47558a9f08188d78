from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flexalign.calibration.results import DrawnSamples, StoredSamples
from flexalign.errors import ConfigError, DataError, ServingError
from flexalign.evaluation.samples import ResultsFolder
from flexalign.evaluation.sweep import Sweep
from flexalign.evaluation.systems import Cell, Key, Outcome
from flexalign.evaluation.tasks import Task, TaskQuestion
from flexalign.lambdas import unique_settings
from flexalign.systems import Answer, Failure, System


def _row(**changes: Any) -> dict[str, Any]:
    row = {
        "system": "m",
        "setting": "λ=0",
        "task": "t",
        "question": "1",
        "sample": 0,
        "status": "correct",
        "tokens": 10,
    }
    return row | changes


def _folder(path: Path, rows: list[dict[str, Any]]) -> ResultsFolder:
    folder = ResultsFolder.begin(path, {"systems": []}, [], {})
    folder.append(rows)
    return folder


def test_answers_come_back_in_order(tmp_path: Path):
    rows = [
        _row(sample=1, status="wrong", tokens=7),
        _row(),
        _row(question="2", status="truncated", tokens=9),
        _row(question="2", sample=1),
    ]
    stored = StoredSamples(_folder(tmp_path, rows))
    assert (stored.settings, stored.questions, stored.samples) == (["λ=0"], ["1", "2"], 2)
    outcomes = stored.ask("λ=0", ["2", "1"], 2)
    assert outcomes.table(outcomes.correct).tolist() == [[False, True], [True, False]]
    assert outcomes.table(outcomes.tokens).tolist() == [[9, 10], [10, 7]]


def test_only_what_all_settings_answered_is_offered(tmp_path: Path):
    rows = [_row(), _row(question="2"), _row(question="2", setting="λ=1")]
    assert StoredSamples(_folder(tmp_path, rows)).questions == ["2"]


@pytest.mark.parametrize("key", ["system", "task"])
def test_several_want_a_name(tmp_path: Path, key: str):
    folder = _folder(tmp_path, [_row(), _row(**{key: "n", "setting": "λ=9"})])
    with pytest.raises(ConfigError, match=f"more than one {key}"):
        StoredSamples(folder)
    assert StoredSamples(folder, **{key: "n"}).settings == ["λ=9"]


def test_what_is_not_there_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match="no samples of any system"):
        StoredSamples(_folder(tmp_path / "empty", []))
    folder = _folder(tmp_path / "one", [_row()])
    with pytest.raises(DataError, match="2 are needed"):
        StoredSamples(folder).ask("λ=0", ["1"], 2)
    with pytest.raises(ConfigError, match="no samples of n"):
        StoredSamples(folder, system="n")


QUESTIONS = tuple(TaskQuestion(str(number), f"{number}+1=", str(number + 1)) for number in range(4))


class _Backend:
    """Answers right at λ = 0, wrong elsewhere; keeps count, and may fail."""

    def __init__(self, fails: bool = False) -> None:
        self.made: list[Key] = []
        self.released = False
        self._fails = fails

    def describe(self) -> dict[str, Any]:
        return {"thinking_tags": ["<think>", "</think>"]}

    def render(self, messages: list[dict[str, str]]) -> str:
        return messages[0]["content"]

    def run(self, cells: Sequence[Cell], done: Collection[Key]) -> Iterator[list[Outcome]]:
        for cell in cells:
            if cell.key in done:
                continue
            self.made.append(cell.key)
            gold = int(cell.question) + 1 + (cell.setting.lam != 0)
            yield [(cell, Failure("down") if self._fails else Answer(f"\\boxed{{{gold}}}", 5))]

    def release(self) -> None:
        self.released = True


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> _Backend:
    made = _Backend()
    monkeypatch.setattr("flexalign.evaluation.sweep.open_backend", lambda *_: made)
    return made


def _sweep() -> Sweep:
    settings = unique_settings([0.0, 1.0])
    return Sweep([System("s", "pair", ("a", "b"))], [Task("t", QUESTIONS)], settings, samples=2)


def test_what_is_asked_is_drawn_graded_and_kept(tmp_path: Path, backend: _Backend):
    with DrawnSamples(_sweep(), tmp_path) as answers:
        asked = answers.ask("λ=1", ["0"], 2)
        assert asked.table(asked.correct).tolist() == [[False, False]]
        assert answers.ask("λ=0", ["2", "0"], 2).correct.all()
    assert len(backend.made) == 6
    assert backend.released
    with DrawnSamples(_sweep(), tmp_path) as again:
        asked = again.ask("λ=0", ["0", "2", "3"], 2)
        assert asked.table(asked.tokens).tolist() == [[5, 5]] * 3
    assert len(backend.made) == 8
    assert (tmp_path / "summary.json").exists()


def test_samples_that_are_lost_stop_the_tuning(tmp_path: Path, backend: _Backend):
    backend._fails = True
    with (
        pytest.raises(ServingError, match="2 samples at λ=0 could not be made"),
        DrawnSamples(_sweep(), tmp_path) as answers,
    ):
        answers.ask("λ=0", ["1"], 2)
    assert backend.released


def test_a_folder_without_samples_of_a_task_is_said(tmp_path: Path):
    folder = _folder(tmp_path, [_row(), _row(system="n", task="other")])
    with pytest.raises(ConfigError, match="has no samples of n on "):
        StoredSamples(folder, system="n", task=_row()["task"])
