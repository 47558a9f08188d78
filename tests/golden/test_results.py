"""The figures of docs/results.md that can be made again from what benchmarks/results holds.

Nothing here is recorded: the stored files are the reference. The samples behind them are not kept,
so that of the intervals only those of shares can be computed again, from their counts; those of
tokens, differences and distances stand in the files as they were measured. Of the two sections on
SmolLM2 nothing is stored.
"""

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from golden.answers import write_counts

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The benchmarks, whose scripts import from their own folder."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == folder:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["miniature", "dial", "evaluate"])
def test_the_sections_are_written_from_what_is_stored(scripts, tmp_path, monkeypatch, name):
    for part in ("docs/pictures", "benchmarks/results"):
        (tmp_path / part).mkdir(parents=True)
    shutil.copy(RESULTS / f"{name}.json", tmp_path / "benchmarks" / "results")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    emptied = tmp_path / "docs" / "results.md"
    emptied.write_text(f"{before}{begin}\n{end}{rest.split(end)[1]}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--rewrite"])
    runpy.run_path(str(scripts / f"{name}.py"), run_name="__main__")
    assert emptied.read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("lora_dial", "_lora_dial_report"),
        ("grpo", "_grpo_report"),
        ("prompts", "prompts"),
        ("rivals", "rivals"),
        ("dials_vllm", "dials_vllm"),
    ],
)
def test_sections_of_stopped_benchmarks_are_those_of_their_figures(scripts, name, script):
    """These scripts go on from cells that are not kept; only their writing is run."""
    make = runpy.run_path(str(scripts / f"{script}.py"), run_name=script)["section"]
    written = make(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"<!-- {name}: begin -->\n{written}<!-- {name}: end -->" in page


def stored_shares() -> dict[tuple[float, int], tuple[float, float]]:
    """Some intervals of shares of right answers, by the share and the number of questions."""
    found = {}
    dial = json.loads((RESULTS / "dial.json").read_text(encoding="utf-8"))
    for row in dial["rows"][:5]:
        low, share, high = row["accuracy"]
        found[share, dial["options"]["questions"]] = (low, high)
    miniature = json.loads((RESULTS / "miniature.json").read_text(encoding="utf-8"))
    student = miniature["students"][0]
    count = miniature["options"]["questions"]
    found[student["accuracy"], count] = tuple(student["accuracy_interval"])
    evaluated = json.loads((RESULTS / "evaluate.json").read_text(encoding="utf-8"))
    for row in evaluated["smollm2"]["rows"]:
        found[row["accuracy"], row["n_questions"]] = tuple(row["accuracy_ci"])
    return found


def test_the_intervals_of_shares_follow_from_their_counts(run_cli, tmp_path):
    stored = stored_shares()
    counts = {f"{share:.6f} of {count}": (round(share * count), count) for share, count in stored}
    folder = write_counts(tmp_path / "counts", counts)
    result = run_cli("evaluate", "--regrade", "--output", folder, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) == len(stored) == 8
    for row, ((share, count), interval) in zip(rows, stored.items(), strict=True):
        assert (row["n_questions"], row["accuracy"]) == (count, pytest.approx(share, rel=1e-12))
        assert row["accuracy_ci"] == pytest.approx(interval, rel=1e-9, abs=1e-12)
