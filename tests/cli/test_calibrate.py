import json

import pytest

from flexalign.calibration.store import copy_adapter, store_calibration
from flexalign.inra import InRaConfig
from flexalign.miniature import folder, make_traces

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
    store_calibration(tmp_path / "fast", CALIBRATION)
    return tmp_path / "fast"


def test_the_cost_is_told_and_nothing_is_sampled(run_cli):
    result = run_cli(
        *("calibrate", "miniature", "--adapter", "miniature:fast", "--task", "miniature"),
        *("--limit", 10, "--dry-run", "--json"),
    )
    ways, lambdas = json.loads(result.stdout)["sweeps"]
    assert ways == {"settings": ["λ=0", "adaptive 0"], "samples": 20}
    assert lambdas["samples"] == 90


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


def test_a_preview_reads_traces_and_samples_nothing(run_cli, tmp_path):
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(json.dumps(row) + "\n" for row in make_traces(3, 0)))
    for system in ("pair:miniature", "dial:miniature"):
        result = run_cli(
            *("tune", system, "--preview", traces, "--lambda", "0,1,5", "--json"),
            *("-o", tmp_path / "preview"),
        )
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert [row["lambda"] for row in found["rows"]] == [0, 1, 5]
        assert found == json.loads((tmp_path / "preview" / "preview.json").read_text())
        assert (tmp_path / "preview" / "preview.png").stat().st_size > 0
        divergences = [row["divergence"] for row in found["rows"]]
        assert divergences == sorted(divergences)
