import json
from dataclasses import replace

import pytest

from flexalign.calibration.effort import (
    AchievedRatio,
    Calibration,
    EffortLevel,
    SettingMetrics,
    copy_adapter,
    store_calibration,
)
from flexalign.cli.calibrate import _show
from flexalign.inra import InRaConfig, InRaModel
from flexalign.miniature import folder
from flexalign.statistics import Interval

CALIBRATION = {
    "version": 1,
    "measure": "answer_probability",
    "lambda_range": [0.0, 1.0],
    "holes": [],
    "effort": {"thresholds": [[0.0, 0.0], [100.0, 0.8]], "lambdas": [[100.0, 0.0]]},
}


@pytest.fixture
def calibrated(tmp_path):
    copy_adapter(folder("fast"), tmp_path / "fast")
    store_calibration(tmp_path / "fast", Calibration.from_json(CALIBRATION))
    return tmp_path / "fast"


def test_the_cost_is_told_and_nothing_is_sampled(run_cli):
    result = run_cli(
        *("calibrate", "miniature", "--adapter", "miniature:fast", "--task", "miniature"),
        *("--limit", 10, "--dry-run", "--json"),
    )
    ways, lambdas = json.loads(result.stdout)["sweeps"]
    assert ways == {"settings": ["λ=0", "adaptive 0"], "samples": 20}
    assert lambdas["samples"] == 90
    shown = run_cli(
        *("calibrate", "miniature", "--adapter", "miniature:fast", "--task", "miniature"),
        *("--limit", 10, "--dry-run"),
    )
    assert "\n20 samples: λ=0, adaptive 0\n" in shown.stderr
    assert "and, if fast answers are not short, 90 samples: λ=0, λ=0.125" in shown.stderr


def test_an_adaptive_dial_alone_needs_both_ways_and_no_grid(run_cli):
    result = run_cli(
        *("calibrate", "miniature", "--adapter", "miniature:fast", "--task", "miniature"),
        *("--limit", 10, "--dial", "adaptive", "--dry-run", "--json"),
    )
    (ways,) = json.loads(result.stdout)["sweeps"]
    assert ways == {"settings": ["λ=0", "adaptive 0"], "samples": 20}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dial", "speed"), "the dial is auto, adaptive or lambda, not 'speed'"),
        (("--margin", "1"), "margin must be in [0, 1), got 1.0"),
        (("--samples", "0"), "samples must be at least 1, got 0"),
        (("--measure", "feeling"), "measure"),
        (("--save-to", "{there}"), "is there already; move it away or name another"),
    ],
)
def test_wrong_options_are_refused_before_sampling(run_cli, tmp_path, options, message):
    options = [option.format(there=tmp_path) for option in options]
    asked = ("calibrate", "miniature", "--adapter", "miniature:fast", "--task", "miniature")
    save = [] if "--save-to" in options else ["--save-to", tmp_path / "new"]
    result = run_cli(*asked, *options, *save)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "new").exists()


def _level(effort, tokens, accuracy=(0.5, 0.75, 0.9), change=(-0.1, 0.0, 0.1)):
    metrics = SettingMetrics(Interval(tokens - 1, tokens, tokens + 1), 4, 21, Interval(*accuracy))
    return EffortLevel(effort, "λ=0.5", 10.0, "measured", metrics, Interval(*change))


def test_what_was_measured_is_shown_with_its_holes_and_steps(capsys):
    levels = tuple(_level(effort, tokens) for effort, tokens in ((0.0, 10.0), (50.0, 12.5)))
    points = ((100.0, 0.0),)
    _show(Calibration(points, holes=((0.25, 0.75),), threshold=0.123456, levels=levels))
    shown = capsys.readouterr()
    row = "50 λ=0.5 10.0 12.5 4 21 75.0 [50, 90]"
    assert row in [" ".join(line.split()) for line in shown.out.splitlines()]
    assert "skipped: λ between 0.25 and 0.75" in shown.out
    assert "the adapter's own threshold: 0.123" in shown.out
    assert "note: at effort 50 no setting has the line's tokens to within 10 %" in shown.err
    _show(Calibration(points, levels=levels[:1]))
    shown = capsys.readouterr()
    assert "skipped" not in shown.out
    assert "threshold" not in shown.out
    assert "÷ asked" not in shown.out
    assert shown.err == ""


def test_ratios_by_question_stand_in_a_column_of_their_own(capsys):
    known = replace(_level(0.0, 10.0), achieved=AchievedRatio(0.25, 1.0, 1.875))
    _show(Calibration(((100.0, 0.0),), levels=(known, _level(50.0, 10.0))))
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows[0].endswith("accuracy ÷ asked")
    assert "0 λ=0.5 10.0 10.0 4 21 75.0 [50, 90] 1.00 [0.25, 1.88]" in rows
    assert "50 λ=0.5 10.0 10.0 4 21 75.0 [50, 90] —" in rows


@pytest.mark.parametrize(
    "name",
    [
        lambda _: "miniature:fast",
        lambda _: folder("fast"),
        lambda _: folder("reference") / ".." / "fast",
        lambda scratch: linked(scratch / "link", folder("fast")),
        lambda scratch: linked(scratch / "weights", folder("fast").parent) / "fast",
    ],
    ids=["name", "path", "dots", "link", "linked parent"],
)
def test_the_packages_own_adapter_is_not_written_to(run_cli, tmp_path, name):
    adapter = name(tmp_path)
    result = run_cli("calibrate", "miniature", "--adapter", adapter, "--task", "miniature")
    assert result.exit_code == 2
    assert f"{adapter} is part of the package" in result.stderr
    assert InRaConfig.load(folder("fast")).calibration is None


def test_no_copy_is_put_into_the_package(run_cli, tmp_path):
    inside = linked(tmp_path / "weights", folder("fast").parent) / "new"
    asked = ("calibrate", "miniature", "--adapter", "miniature:fast", "--task", "miniature")
    result = run_cli(*asked, "--save-to", inside)
    assert result.exit_code == 2
    assert "is inside the package" in result.stderr
    assert not inside.exists()


def linked(link, target):
    link.symlink_to(target)
    return link


def test_an_adapter_that_changes_nothing_gets_no_calibration(run_cli, tmp_path):
    InRaModel.create("miniature").save_pretrained(tmp_path / "new")
    result = run_cli(
        *("calibrate", "miniature", "--adapter", tmp_path / "new", "--task", "miniature"),
        *("--limit", 3, "--max-new-tokens", 12),
    )
    assert result.exit_code == 2
    assert "no setting of this dial saves tokens beyond chance" in result.stderr
    assert InRaConfig.load(tmp_path / "new").calibration is None


@pytest.mark.parametrize("is_hopeless", [True, False])
def test_a_dial_that_only_loses_is_called_so_at_the_end(
    run_cli, calibrated, monkeypatch, is_hopeless
):
    level = _level(50.0, 10.0, (0.3, 0.4, 0.5), (-0.5, -0.4, -0.3 * is_hopeless))
    found = replace(Calibration.from_json(CALIBRATION), levels=(level,), margin=0.02)
    monkeypatch.setattr("flexalign.cli.calibrate._run", lambda *_: found)
    asked = ("calibrate", "miniature", "--adapter", calibrated, "--task", "miniature")
    for more in ((), ("--json",)):
        result = run_cli(*asked, *more)
        assert result.exit_code == 0, result.stderr
        last = result.stderr.splitlines()[-1]
        assert last.startswith("warning: every effort below 100 is less accurate") == is_hopeless
    assert Calibration.from_json(InRaConfig.load(calibrated).calibration) == found


@pytest.mark.slow
def test_what_is_calibrated_can_be_asked_for(run_cli, tmp_path):
    result = run_cli(
        *("calibrate", "miniature", "--adapter", "miniature:fast", "--task", "miniature:3"),
        *("--limit", 12, "--save-to", tmp_path / "fast", "--json", "-o", tmp_path / "samples"),
    )
    assert result.exit_code == 0, result.stderr
    calibration = json.loads(result.stdout)
    assert InRaConfig.load(tmp_path / "fast").calibration == calibration
    assert [level["effort"] for level in calibration["levels"]] == [0, 25, 50, 75, 100]
    answer = run_cli(
        *("generate", "miniature", "3 + 1 + 5 ?", "--adapter", tmp_path / "fast"),
        *("--effort", "0,100", "--json", "--temperature", 1, "--max-new-tokens", 300),
    )
    assert answer.exit_code == 0, answer.stderr
    fast, slow = json.loads(answer.stdout)
    assert fast["route"] == "fast"
    assert slow["lambda"] == 0.0
    assert fast["tokens"] < slow["tokens"]


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "miniature", "1 + 2 + 3 ?", "--adapter", "miniature:fast"),
        ("chat", "miniature", "--adapter", "miniature:fast"),
        ("evaluate", "dial:miniature", "--task", "miniature", "--dry-run"),
    ],
)
def test_effort_before_calibration_names_the_command(run_cli, command):
    result = run_cli(*command, "--effort", 50)
    assert result.exit_code == 2
    assert "flexalign calibrate" in " ".join(result.stderr.split())


def test_effort_needs_an_adapter_and_numbers(run_cli, calibrated):
    result = run_cli("generate", "miniature", "1 + 2 + 3 ?", "--effort", 50)
    assert (result.exit_code, "needs an InRa adapter" in result.stderr) == (2, True)
    result = run_cli("generate", "miniature", "?", "--adapter", calibrated, "--effort", "much")
    assert (result.exit_code, "'much' is not a number" in result.stderr) == (2, True)


def test_a_sweep_can_be_asked_for_efforts(run_cli, calibrated):
    result = run_cli(
        *("evaluate", f"dial:miniature,{calibrated}", "--task", "miniature", "--limit", 2),
        *("--effort", "0,50,100", "--dry-run", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    (system,) = json.loads(result.stdout)["configuration"]["systems"]
    assert [one["id"] for one in system["settings"]] == ["adaptive 0", "adaptive 0.4", "λ=0"]
    assert [one["effort"] for one in system["settings"]] == [0, 50, 100]


def test_what_was_asked_for_as_an_effort_is_called_one(run_cli, calibrated, tmp_path):
    asked = (
        *("evaluate", f"dial:miniature,{calibrated}", "--task", "miniature", "--limit", 2),
        *("--effort", "50,100", "--lambda", "1", "-n", 1, "--max-new-tokens", 4),
    )
    assert "dial:miniature,fast: λ=1, effort 50 (adaptive 0.4), effort 100 (λ=0)" in (
        run_cli(*asked, "--dry-run").stderr
    )
    result = run_cli(*asked, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    labels = ["λ=1", "effort 50 (adaptive 0.4)", "effort 100 (λ=0)"]
    rows = [line for line in result.stdout.splitlines() if "2×1" in line]
    assert all(row.startswith(label) for row, label in zip(rows, labels, strict=True)), rows
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for part in ("rows", "means"):
        found = [(row["setting"], row["effort"], row["lambda"]) for row in summary[part]]
        assert found == [("λ=1", None, 1.0), ("adaptive 0.4", 50.0, None), ("λ=0", 100.0, 0.0)]


def test_a_sweep_of_efforts_says_once_that_it_samples_otherwise(run_cli, tmp_path):
    copy_adapter(folder("fast"), tmp_path / "fast")
    sampling = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 400, "seed": 3}
    sampled = Calibration.from_json(CALIBRATION | {"sampling": sampling})
    store_calibration(tmp_path / "fast", sampled)
    asked = ("evaluate", f"dial:miniature,{tmp_path / 'fast'}", "--task", "miniature", "--dry-run")
    same = ("--temperature", "1", "--top-p", "0.9", "--max-new-tokens", 400)
    told = run_cli(*asked, "--effort", "0,50", *same, "--top-p", 1, "--max-new-tokens", 50).stderr
    assert told.count("effort was calibrated") == 1
    assert "at top_p 0.9, max_new_tokens 400 and is asked for at top_p 1.0, max_new_tokens 50" in (
        told
    )
    assert "was calibrated" not in run_cli(*asked, "--effort", "0,50", *same).stderr
    assert "was calibrated" not in run_cli(*asked, "--lambda", "0,1").stderr


def test_two_efforts_that_are_one_setting_are_both_named(run_cli, calibrated):
    asked = ("evaluate", f"dial:miniature,{calibrated}", "--task", "miniature", "--dry-run")
    result = run_cli(*asked, "--effort", "100", "--lambda", "0")
    assert result.exit_code == 2
    assert "λ=0 and effort 100 (λ=0) are one and the same setting; leave one" in result.stderr
