"""`tune` on stored answers, and its plan: the figures as they were recorded.

To record them again: FLEXALIGN_GOLDEN=record python -m pytest tests/golden
"""

import json
from pathlib import Path

import pytest

from golden.answers import Setting, Task, write_results

TASK = Task("many", 150)
SETTINGS = (
    Setting("λ=0", 0.60, 430, 0.0),
    Setting("λ=0.25", 0.61, 360, 0.25),
    Setting("λ=0.5", 0.62, 290, 0.5),
    Setting("λ=0.75", 0.57, 240, 0.75),
    Setting("λ=1", 0.45, 150, 1.0),
    Setting(
        "adaptive 0.5",
        *(0.66, 200),
        policy={"policy": "adaptive", "threshold": 0.5, "measure": "answer_probability"},
        fast=0.7,
    ),
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune") / "sweep"
    return write_results(folder, {"dial": SETTINGS}, [TASK], 4, seed=5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("margin", ("--margin", 0.1)),
        ("narrow", ("--margin", 0.01)),
        ("futile", ("--margin", 0.03, "--lambda", "0.25,0.5,0.75,1", "--seed", 6)),
        ("pocock", ("--margin", 0.08, "--looks", "pocock", "--confidence", 0.9, "--seed", 3)),
        ("betting", ("--margin", 0.2, "--looks", "betting", "--seed", 1)),
        ("budget", ("--max-tokens-mean", 300)),
        ("budget-out-of-reach", ("--max-tokens-mean", 120, "--samples", 2)),
        ("lambdas", ("--margin", 0.12, "--lambda", "0.5,0.75,1", "--samples", 3)),
    ],
)
def test_what_is_chosen_and_on_what_evidence(run_cli, sweep, tmp_path, golden, name, options):
    result = run_cli("tune", "--from", sweep, *options, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    tuned = json.loads(result.stdout)
    assert tuned == json.loads((tmp_path / "tuned.json").read_text(encoding="utf-8"))
    for part in (tuned["choice"], tuned["proof"]):
        part["questions"] = " ".join(part["questions"])
    card = (tmp_path / "tuned.md").read_text(encoding="utf-8").splitlines()
    golden(f"tune-{name}", tuned | {"card": card})


def test_answers_that_are_in_the_folder_are_not_drawn_again(run_cli, tmp_path, golden):
    task = Task("few", 40)
    questions = task.write(tmp_path)
    asked = ("dial:miniature", "--task", questions, "--samples", 2)
    dry = run_cli("evaluate", *asked, "--lambda", "0,0.5,1", "--dry-run", "--json")
    assert dry.exit_code == 0, dry.stderr
    configuration = json.loads(dry.stdout)["configuration"]
    (system,) = configuration["systems"]
    settings = (SETTINGS[0], SETTINGS[2], SETTINGS[4])
    folder = write_results(
        tmp_path / "out", {system["name"]: settings}, [task], 2, configuration=configuration, seed=6
    )
    before = (folder / "samples.jsonl").read_bytes()
    result = run_cli(
        *("tune", *asked, "--lambda", "0.5,1", "--margin", 0.3, "-o", folder, "--json")
    )
    assert result.exit_code == 0, result.stderr
    assert (folder / "samples.jsonl").read_bytes() == before
    tuned = json.loads(result.stdout)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    golden("tune-drawn", tuned | {"rows": summary["rows"], "means": summary["means"]})


def test_what_stored_answers_can_prove(run_cli, sweep, golden):
    plans = {}
    for options in (
        ("--margin", 0.05),
        ("--margin", 0.2, "--samples", 2, "--confidence", 0.9, "--power", 0.9),
        ("--max-tokens-mean", 300, "--accuracy", 0.7),
    ):
        result = run_cli("tune", "--from", sweep, "--plan", *options, "--json")
        assert result.exit_code == 0, result.stderr
        plans[" ".join(map(str, options))] = json.loads(result.stdout)
    printed = run_cli("tune", "--from", sweep, "--plan").stdout.splitlines()
    golden("plan-stored", plans | {"printed": printed})


def test_what_questions_can_prove_before_anything_is_sampled(run_cli, tmp_path, golden):
    plans = {}
    for count in (2, 3, 20, 500, 3000):
        questions = Task(f"questions{count}", count).write(tmp_path)
        for options in ((), ("--samples", 1, "--accuracy", 0.9), ("--confidence", 0.99)):
            result = run_cli("tune", "--task", questions, "--plan", *options, "--json")
            assert result.exit_code == 0, result.stderr
            plans[" ".join(map(str, (count, *options)))] = json.loads(result.stdout)
    golden("plan", plans)
