import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexalign.errors import DataError
from flexalign.evaluation.frontier import Point, frontier, mixture_lines
from flexalign.evaluation.report import render, write_report
from flexalign.evaluation.report.render import STATUSES, render_page, report_payload
from flexalign.evaluation.report.responses import shown_responses
from flexalign.evaluation.report.runs import ReportRun, RowKey


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Path]) -> Path:
    return make_run(questions=6, samples=3)


@pytest.fixture(scope="module")
def payload(run: Path) -> dict[str, Any]:
    return report_payload(ReportRun.open_all([run]), 200, 20)


def _data(page: str) -> Any:
    return json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])


def test_page_stands_alone_and_holds_the_data(run, payload, tmp_path):
    page = write_report([run], tmp_path).read_text(encoding="utf-8")
    assert _data(page) == json.loads(json.dumps(payload))
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|@import|url\(|fetch\(|innerHTML""", page)
    assert page.count("<script") == page.count("</script>") == 2
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "pareto-beta.png").exists()


def test_infinities_and_lone_surrogates_are_written_as_json_can(tmp_path):
    page = render_page({"open": [float("-inf"), 1.5, float("nan")]})
    assert _data(page) == {"open": [None, 1.5, None]}


def test_a_lone_surrogate_does_not_stop_the_report(make_run, tmp_path):
    folder = make_run(questions=2, samples=2, tasks=("one",))
    samples = folder / "samples.jsonl"
    samples.write_text(samples.read_text(encoding="utf-8").replace("again", "\\ud800", 1))
    page = write_report([folder], tmp_path).read_text(encoding="utf-8")
    assert "\ud800" in json.dumps(_data(page), ensure_ascii=False)


def test_last_cap_and_histogram_agree_with_the_summary(payload):
    for task in payload["tasks"]:
        for setting in task["settings"]:
            row = setting["row"]
            assert setting["budget"]["accuracy"][-1] == pytest.approx(row["accuracy"])
            assert setting["budget"]["tokens"][-1] == pytest.approx(row["tokens"])
            for status in STATUSES:
                share = row["accuracy"] if status == "correct" else row[status]
                assert sum(setting["histogram"][status]) == round(share * row["n_samples"])


def test_settings_stand_in_the_order_of_the_dial(payload):
    lams = [setting["row"]["lambda"] for setting in payload["tasks"][0]["settings"]]
    assert lams == [-0.5, 0.0, 0.5, 1.0, 2.0, None]
    references = [setting["reference"] for setting in payload["tasks"][0]["settings"]]
    assert references == [1, None, 1, 1, 1, 1]


def test_an_effort_names_its_setting_in_page_and_picture(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for row in [*summary["rows"], *summary["means"]]:
        row["effort"] = 40.0 if row["setting"] == "adaptive 0.5" else None
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    shown = report_payload(ReportRun.open_all([folder]), 1, 1)
    last = shown["tasks"][0]["settings"][-1]
    assert last["row"]["label"] == "effort 40 (adaptive 0.5)"
    assert shown["means"][-1]["label"] == "effort 40 (adaptive 0.5)"
    assert shown["means"][0]["label"] == shown["means"][0]["setting"]
    drawn = []
    monkeypatch.setattr(render, "draw_pareto", lambda _, points, **__: drawn.append(points))
    write_report([folder], tmp_path)
    assert [point.label for point in drawn[0]][-2:] == ["λ=2", "effort 40 (adaptive 0.5)"]


def test_several_runs_are_told_apart(run, make_run, tmp_path):
    other = make_run(name="later", questions=6, samples=2, seed=1)
    shown = report_payload(ReportRun.open_all([run, other]), 200, 20)
    series = {setting["series"] for setting in shown["tasks"][0]["settings"]}
    assert series == {"sweep · dial", "later · dial"}
    first = shown["responses"]["questions"][0]
    assert {response["setting"] for response in first["responses"]} == set(range(12))


def test_thinking_is_folded_away_from_the_answer(payload):
    responses = [r for q in payload["responses"]["questions"] for r in q["responses"]]
    closed = [response for response in responses if response["closed"]]
    assert closed
    assert all("boxed{7}" in response["answer"] for response in closed)
    assert all("boxed{7}" not in response["thinking"] for response in responses)
    assert all(response["answer"] == "" for response in responses if not response["closed"])


def test_what_is_shown_is_bounded_and_said(run):
    opened = ReportRun.open_all([run])[0]
    tasks = {
        task: [(opened, key) for key in opened.samples if key.task == task]
        for task in ("alpha", "beta")
    }
    few = shown_responses(tasks, 4, 20)
    assert few["shown"] == [4, 4 * 6 * 3]
    assert few["total"] == [12, 12 * 6 * 3]
    size = sum(len(row["response"].encode()) for row in opened.responses() if row["sample"] == 0)
    tight = shown_responses(tasks, 200, (size + 10) / 1e6)
    assert tight["shown"] == [12, 12 * 6]
    assert {r["sample"] for q in tight["questions"] for r in q["responses"]} == {0}


def test_frontier_against_the_definition():
    generator = np.random.default_rng(3)
    points = [Point(*generator.integers(0, 6, 2).astype(float)) for _ in range(30)]
    beaten = {
        i
        for i, a in enumerate(points)
        for b in points
        if (b.tokens < a.tokens and b.accuracy >= a.accuracy)
        or (b.tokens <= a.tokens and b.accuracy > a.accuracy)
    }
    assert frontier(points) == set(range(30)) - beaten


def test_chord_joins_the_ends_where_both_are():
    lams = [0.0, 1.0]
    points = [Point(100 - 50 * lam, 0.8 - 0.1 * lam) for lam in lams]
    assert mixture_lines(points, lams)["chord"] == [(100, 0.8), (50, 0.8 - 0.1)]
    assert mixture_lines(points[:1], lams[:1])["chord"] is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("summary.json", "{", "is not JSON"),
        ("summary.json", "{}", "the field 'rows' is missing"),
        ("samples.jsonl", '{"system": 1}\n', "line 1: the field 'setting' is missing"),
        ("samples.jsonl", '{"sys\n', "line 1"),
        ("questions.jsonl", None, "has no questions.jsonl"),
    ],
)
def test_a_damaged_folder_is_named(run, tmp_path, name, text, message):
    folder = shutil.copytree(run, tmp_path / "copy")
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        write_report([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_put_together(run):
    with pytest.raises(DataError, match="at least one"):
        ReportRun.open_all([])
    with pytest.raises(DataError, match="given twice"):
        ReportRun.open_all([run, run / "."])


def test_key_is_what_rows_and_samples_share(run):
    opened = ReportRun.open_all([run])[0]
    rows = {RowKey.of(row) for row in opened.summary.rows}
    assert rows == set(opened.samples)


def test_compare_writes_one_report(run, make_run, run_cli, tmp_path):
    other = make_run(name="later", questions=6, samples=2)
    done = run_cli("compare", run, other, "--output", tmp_path / "both", "--json")
    assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 24
    assert "report.html" in done.stderr.replace("\n", "")
    assert len(_data((tmp_path / "both/report.html").read_text(encoding="utf-8"))["runs"]) == 2
