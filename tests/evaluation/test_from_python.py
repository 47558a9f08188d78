"""The examples in the pages on evaluate, tune and calibrate, run as they stand there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flexalign.calibration.effort import Calibration
from flexalign.evaluation.samples import Samples
from flexalign.inra import InRaConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def run_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the Python of a page that holds one of some words, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(page: str, *words: str) -> dict[str, Any]:
        text = (DOCS / page).read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        names: dict[str, Any] = {}
        for block in blocks:
            if any(word in block for word in words):
                exec(block, names)
        return names

    return run


def test_a_sweep_is_run_and_read_as_the_page_says(run_page, tmp_path, capsys):
    names = run_page("evaluation.md", "compare, evaluate", "ResultsFolder")
    summary = names["result"].summary
    stored = json.loads((tmp_path / "out" / "sweep" / "summary.json").read_text(encoding="utf-8"))
    assert summary.to_json() == stored
    assert (tmp_path / "out" / "sweep" / "report.html").is_file()
    assert capsys.readouterr().out.startswith("λ=0: 0.")
    assert [row.setting for row in names["both"].rows] == ["λ=0", "λ=1", "route 0.5"]
    assert [row.tokens for row in names["both"].rows] == [row.tokens for row in summary.rows]

    fast, slow, row = names["fast"], names["slow"], summary.rows[1]
    assert (len(fast), fast.shape) == (30, (30, 1))
    assert fast.token_cut(slow) == pytest.approx(row.token_cut)
    again = Samples.from_rows(fast.to_rows())
    assert again.to_rows() == fast.to_rows()
    assert again.accuracy_interval() == row.accuracy


def test_a_system_is_tuned_as_the_page_says(run_page, tmp_path):
    tuned = run_page("tune.md", "import NonInferiority")["tuned"]
    stored = json.loads((tmp_path / "out" / "tuned" / "tuned.json").read_text(encoding="utf-8"))
    assert stored["chosen"] == tuned.chosen
    assert stored["candidates"] == ["λ=0.5", "λ=1"]
    assert stored["samples"]["spent"] == tuned.samples <= 3 * 30


def test_an_adapter_is_calibrated_as_the_page_says(run_page, tmp_path):
    calibration = run_page("calibrate.md", "import calibrate")["calibration"]
    stored = InRaConfig.load(tmp_path / "out" / "fast").calibration
    assert stored == json.loads(json.dumps(calibration.to_json()))
    assert Calibration.from_json(stored) == calibration
    assert [level.effort for level in calibration.levels] == [0, 25, 50, 75, 100]
