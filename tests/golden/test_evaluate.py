"""`evaluate --regrade` and `compare` on stored samples: the figures as they were recorded.

To record them again: FLEXALIGN_GOLDEN=record python -m pytest tests/golden
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from golden.answers import Setting, Task, write_results

TASKS = (Task("sums", 24), Task("products", 15), Task("alone", 1))
SYSTEMS = {
    "pair": (
        Setting("λ=0", 0.60, 430, 0.0),
        Setting("λ=0.5", 0.62, 330, 0.5),
        Setting("λ=1", 0.55, 240, 1.0),
        Setting("λ=2", 0.35, 150, 2.0),
        Setting("route 0.5", 0.58, 330, policy={"policy": "route", "share": 0.5}),
    ),
    "dial": (
        Setting("λ=0", 0.62, 420, 0.0, effort=100.0),
        Setting("λ=1", 0.45, 40, 1.0, effort=0.0),
        Setting(
            "adaptive 0.5",
            *(0.66, 160),
            policy={"policy": "adaptive", "threshold": 0.5, "measure": "answer_probability"},
            effort=40.0,
            fast=0.7,
        ),
        Setting("λ=-0.5", 0.61, 560, -0.5),
    ),
    "student": (Setting("as it is", 0.58, 250),),
    "perfect": (Setting("λ=0", 2.0, 90, 0.0), Setting("λ=1", -1.0, 30, 1.0)),
}


def is_there(system: str, setting: str, task: str, question: str, sample: int) -> bool:
    """Some samples are missing: a setting's on a few questions, and a system's on one task."""
    if (system, task) == ("student", "alone"):
        return False
    if (system, setting, task) == ("pair", "λ=2", "products"):
        return int(question) > 4 and sample < 2
    return (system, setting, question) != ("dial", "λ=1", "7")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_results(
        tmp_path / "sweep", SYSTEMS, TASKS, 3, baseline="pair", seed=1, keep=is_there
    )


def summarised(run_cli: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """Grade and sum up again; return what is written and what is printed."""
    result = run_cli("evaluate", "--regrade", "--output", folder)
    assert result.exit_code == 0, result.stderr
    assert "0 grades have changed" in result.stderr
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    printed = [line.rstrip() for line in result.stdout.splitlines()]
    return {"rows": summary["rows"], "means": summary["means"], "printed": printed}


def test_the_summary_of_stored_samples(run_cli, sweep, golden):
    before = (sweep / "samples.jsonl").read_text(encoding="utf-8")
    golden("summary", summarised(run_cli, sweep))
    assert (sweep / "samples.jsonl").read_text(encoding="utf-8") == before


def test_the_order_of_the_samples_moves_no_figure(run_cli, sweep, golden):
    path = sweep / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(reversed(lines)), encoding="utf-8")
    golden("summary", summarised(run_cli, sweep))


def test_wrong_grades_are_mended_and_counted(run_cli, sweep):
    path = sweep / "samples.jsonl"
    before = path.read_text(encoding="utf-8")
    right = '"status": "correct"'
    path.write_text(before.replace(right, '"status": "wrong"'), encoding="utf-8")
    result = run_cli("evaluate", "--regrade", "--output", sweep, "--json")
    assert f"{before.count(right)} grades have changed" in result.stderr
    assert path.read_text(encoding="utf-8") == before
    assert json.loads(result.stdout) == json.loads((sweep / "summary.json").read_text())


def test_the_figures_of_the_report(run_cli, tmp_path, golden):
    systems = {name: SYSTEMS[name][:3] for name in ("pair", "dial")}
    folder = write_results(tmp_path / "small", systems, TASKS[1:2], 2, seed=2)
    assert run_cli("evaluate", "--regrade", "--output", folder).exit_code == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    payload = json.loads(data)
    responses = {name: payload["responses"][name] for name in ("shown", "total")}
    kept = {name: payload[name] for name in ("statuses", "tasks", "means")}
    golden("report", kept | {"responses": responses})


def test_several_sweeps_side_by_side(run_cli, tmp_path, golden):
    folders = [
        write_results(tmp_path / name, {"pair": SYSTEMS["pair"][:3]}, TASKS[:2], 2, seed=seed)
        for seed, name in enumerate(("first", "second"), start=3)
    ]
    for folder in folders:
        assert run_cli("evaluate", "--regrade", "--output", folder).exit_code == 0
    result = run_cli("compare", *folders, "--json")
    assert result.exit_code == 0, result.stderr
    printed = run_cli("compare", *folders).stdout.splitlines()
    golden("compare", json.loads(result.stdout) | {"printed": [line.rstrip() for line in printed]})
