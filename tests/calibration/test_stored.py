import json
from pathlib import Path
from typing import Any

import pytest

from flexalign.calibration.stored import StoredAnswers
from flexalign.errors import ConfigError, DataError


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


def _write(folder: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows) + tail
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_answers_come_back_in_order(tmp_path: Path):
    rows = [
        _row(sample=1, status="wrong", tokens=7),
        _row(),
        _row(question="2", status="truncated", tokens=9),
        _row(question="2", sample=1),
    ]
    stored = StoredAnswers(_write(tmp_path, rows, tail='{"half'))
    assert (stored.settings, stored.questions, stored.samples) == (["λ=0"], ["1", "2"], 2)
    outcomes = stored.ask("λ=0", ["2", "1"], 2)
    assert outcomes.correct.tolist() == [[False, True], [True, False]]
    assert outcomes.tokens.tolist() == [[9, 10], [10, 7]]


def test_only_what_all_settings_answered_is_offered(tmp_path: Path):
    rows = [_row(), _row(question="2"), _row(question="2", setting="λ=1")]
    assert StoredAnswers(_write(tmp_path, rows)).questions == ["2"]


def test_several_systems_want_a_name(tmp_path: Path):
    folder = _write(tmp_path, [_row(), _row(system="n", setting="λ=9")])
    with pytest.raises(ConfigError, match="more than one system"):
        StoredAnswers(folder)
    assert StoredAnswers(folder, system="n").settings == ["λ=9"]


def test_what_is_not_there_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not there"):
        StoredAnswers(tmp_path)
    folder = _write(tmp_path, [_row()])
    with pytest.raises(DataError, match="2 are needed"):
        StoredAnswers(folder).ask("λ=0", ["1"], 2)
    with pytest.raises(ConfigError, match="no samples of n"):
        StoredAnswers(folder, system="n")


@pytest.mark.parametrize(("line", "message"), [("{", "not JSON"), ('{"system": 1}', "no field")])
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str):
    with pytest.raises(DataError, match=f"line 2: {message}"):
        StoredAnswers(_write(tmp_path, [_row()], tail=line + "\n"))
