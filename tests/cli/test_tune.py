import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexalign.cli.tune import cost_of_iterating, next_step
from flexalign.evaluation.samples import ResultsFolder
from flexalign.lambdas import Setting
from flexalign.miniature import make_traces
from flexalign.systems import parse_system

GOOD, BAD = "λ=1", "λ=2"


def _rows(questions: int, samples: int) -> list[dict[str, Any]]:
    """Stored answers: λ=1 saves half and is as right as λ=0, λ=2 is nearly always wrong."""
    generator = np.random.default_rng(0)
    rates = generator.beta(2, 1, questions)
    tokens = {"λ=0": 100, GOOD: 50, BAD: 20}
    return [
        {
            "system": "dial:a,b",
            "setting": setting,
            "task": "sums",
            "question": str(question),
            "sample": sample,
            "status": "correct"
            if generator.random() < rates[question] * (0.2 if setting == BAD else 1)
            else "wrong",
            "tokens": tokens[setting] + int(generator.integers(10)),
        }
        for question in range(questions)
        for setting in tokens
        for sample in range(samples)
    ]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    ResultsFolder.begin(tmp_path / "sweep", {"systems": []}, [], {}).append(_rows(150, 4))
    return tmp_path / "sweep"


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [{"problem": f"{n} + 1", "answer": str(n + 1)} for n in range(40)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_stored_sweep_is_tuned_at_no_cost(run_cli, sweep: Path, tmp_path: Path):
    output = tmp_path / "tuned"
    result = run_cli("tune", "--from", sweep, "--margin", "0.2", "-o", output, "--json")
    assert result.exit_code == 0, result.stderr
    tuned = json.loads(result.stdout)
    assert tuned["chosen"] == GOOD
    assert tuned == json.loads((output / "tuned.json").read_text(encoding="utf-8"))
    assert (output / "tuned.md").is_file()
    assert (output / "tuned.png").is_file()


def test_a_variance_needs_two_settings(run_cli, tmp_path: Path):
    alone = [row for row in _rows(20, 2) if row["setting"] == "λ=0"]
    ResultsFolder.begin(tmp_path / "sweep", {"systems": []}, [], {}).append(alone)
    result = run_cli("tune", "--plan", "--from", tmp_path / "sweep")
    assert result.exit_code == 2, result.stderr
    assert "the stored samples need λ=0 and a candidate; sweep both" in result.stderr


def test_what_was_chosen_is_told_with_its_proof(run_cli, sweep: Path, tmp_path: Path):
    asked = ("tune", "--from", sweep, "--margin", "0.2", "-o", tmp_path / "tuned")
    result = run_cli(*asked)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == GOOD
    drawn = json.loads((tmp_path / "tuned" / "tuned.json").read_text(encoding="utf-8"))["samples"]
    assert "held-out: accuracy " in result.stderr
    assert f"{drawn['spent']} of {drawn['exhaustive']} samples were needed" in result.stderr


def test_the_two_questions_are_answered_of_this_tuning(run_cli, tmp_path: Path):
    """λ=4 is two rounds of λ=2: of the stored answers it loses what they lose."""
    rows = [
        row | {"setting": {GOOD: "λ=2", BAD: "λ=4"}.get(row["setting"], row["setting"])}
        for row in _rows(150, 4)
    ]
    ResultsFolder.begin(tmp_path / "sweep", {"systems": []}, [], {}).append(rows)
    asked = ("tune", "--from", tmp_path / "sweep", "--margin", "0.2", "-o", tmp_path / "tuned")
    result = run_cli(*asked, "--lambda", "2,4")
    assert result.exit_code == 0, result.stderr
    tuned = json.loads((tmp_path / "tuned" / "tuned.json").read_text(encoding="utf-8"))
    [proved] = [row for row in tuned["proof"]["finalists"] if row["setting"] == "λ=2"]
    held_out = proved["evidence"]["questions"]
    assert (
        f"How to choose λ: take what is proved, not what looks best. Of 2 candidates λ=2 is, on "
        f"{held_out} questions that had no part in the choice: "
    ) in result.stderr
    [deeper] = [r["evidence"] for r in tuned["choice"]["standings"] if r["setting"] == "λ=4"]
    low, change, high = (100 * value for value in deeper["difference"])
    assert change < -20
    assert (
        "What iterating costs in accuracy: two rounds of λ = 2 aim at λ = 4, whose accuracy is "
        f"{change:+.1f} points [{low:+.1f}, {high:+.1f}] from λ = 0's with "
        f"{deeper['token_cut']:.1%} fewer tokens ({deeper['questions']} questions"
    ) in result.stderr

    alone = run_cli(*asked[:-1], tmp_path / "alone", "--lambda", "2").stderr
    assert "The only candidate is, on " in alone
    assert "aim at λ = 4, which was no candidate; see what that costs with --lambda 2,4." in alone


def test_where_nothing_is_proved_the_reference_is_left(run_cli, sweep: Path, tmp_path: Path):
    arguments = ("--from", sweep, "--lambda", "2", "--margin", "0.1", "-o", tmp_path / "tuned")
    told = run_cli("tune", *arguments).stderr
    assert "The only candidate is not proved here (" in told
    assert "); λ = 0 is what is left." in told
    assert "n rounds of λ aim at λⁿ" in told


def test_a_dial_is_not_iterated():
    assert "a dial is not iterated" in cost_of_iterating(None, parse_system("dial:a,b"), None)


def test_none_is_an_answer_and_no_failure(run_cli, sweep: Path, tmp_path: Path):
    arguments = ("--from", sweep, "--lambda", "2", "--margin", "0.1", "-o", tmp_path / "tuned")
    result = run_cli("tune", *arguments)
    assert (result.exit_code, result.stdout.strip()) == (0, "none")


def test_a_budget_asks_for_the_most_accuracy(run_cli, sweep: Path, tmp_path: Path):
    arguments = ("--from", sweep, "--max-tokens-mean", "70", "-o", tmp_path / "tuned", "--json")
    assert json.loads(run_cli("tune", *arguments).stdout)["chosen"] == GOOD


def test_the_plan_needs_no_system(run_cli, sums: Path):
    result = run_cli("tune", "--plan", "--task", sums, "--samples", "4", "--json")
    plan = json.loads(result.stdout)
    assert (plan["questions"], plan["samples"]) == (40, 4)
    assert plan["tune_margin"] > plan["margin"] > plan["costs"][0]["margin"]
    told = run_cli("tune", "--plan", "--task", sums, "--samples", "4").stdout
    assert f"40 questions × 4 samples prove a margin of {100 * plan['margin']:.1f} points" in told
    assert "Your margin, 2 points: tune will not mostly prove it" in told
    wide = run_cli("tune", "--plan", "--task", sums, "--samples", "4", "--margin", "0.9").stdout
    assert "Your margin, 90 points: tune will mostly prove it" in wide


@pytest.mark.parametrize(
    ("goal", "asked", "is_proved"),
    [
        ((), 0.02, False),
        (("--margin", "0.9"), 0.9, True),
        (("--max-tokens-mean", "50"), None, None),
    ],
)
def test_the_plan_in_json_has_the_verdict_too(run_cli, sums: Path, goal, asked, is_proved):
    result = run_cli("tune", "--plan", "--task", sums, "--samples", "4", *goal, "--json")
    plan = json.loads(result.stdout)
    assert (plan["asked_margin"], plan["is_proved"]) == (asked, is_proved)


def test_a_stored_sweep_gives_the_plan_its_variance(run_cli, sweep: Path):
    arguments = ("--plan", "--from", sweep, "--json")
    measured = json.loads(run_cli("tune", *arguments).stdout)["variance"]
    assumed = json.loads(run_cli("tune", *arguments, "--accuracy", "0.5").stdout)["variance"]
    assert assumed == {"between": pytest.approx(0.0049), "within": pytest.approx(0.2)}
    assert measured["between"] > 0.02  # λ=2 loses most where the most could be lost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--output is missing"),
        (("-o", "x"), "--task is missing"),
        (("-o", "x", "--task", "miniature"), "SYSTEM is missing"),
        (("model:miniature", "-o", "x", "--task", "miniature"), "has no dial to tune"),
        (("dial:miniature", "-o", "x", "--task", "miniature", "--lambda", "0"), "no candidate"),
        (
            ("interpolate:miniature", "-o", "x", "--task", "miniature", "--lambda=-1,1"),
            "leads away from the aligned model",
        ),
        (("--plan", "--task", "miniature", "--margin", "0"), "the margin must be"),
        (("--plan", "--task", "miniature", "--looks", "daily"), "looks must be one of"),
        (("a", "--from", "x", "-o", "x"), "SYSTEM is not asked"),
        (("a", "--preview", "t", "--dry-run"), "--dry-run has no meaning with --preview"),
        (("a", "--preview", "t", "--from", "s"), "--from has no meaning with --preview"),
        (("--plan", "--task", "miniature", "--top-k", 20), "--top-k has no meaning without --prev"),
        (("--from", "s", "-o", "x", "--limit", 50), "--limit has no meaning with --from"),
        (
            ("--from", "s", "-o", "x", "--temperature", 1),
            "--temperature has no meaning with --from",
        ),
        (
            ("--plan", "--task", "miniature", "--margin", 0.1, "--max-tokens-mean", 50),
            "--margin has no meaning with --max-tokens-mean",
        ),
    ],
)
def test_wrong_input_is_said_at_once(run_cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run_cli("tune", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "chosen", "said"),
    [
        ("pair:a,b", 2.5, "flexalign realign recipe.yaml --lambda 2.5, for one model that does it"),
        ("pair:a,b", "adaptive 0.4", "flexalign generate a --aligned b --policy "),
        ("dial:a,b", 0.5, "flexalign generate a --adapter b --lambda 0.5"),
        ("dial:a,b", None, "--plan says what would do"),
    ],
)
def test_what_comes_next_is_a_command(system, chosen, said):
    setting = None if chosen is None else Setting.of(chosen)
    following = next_step(parse_system(system), setting)
    assert said in following
    if chosen == "adaptive 0.4":
        assert Setting.of(shlex.split(following)[-1]) == setting


@pytest.mark.parametrize("system", [None, parse_system("url:http://localhost/v1")])
def test_where_nothing_is_to_be_done_nothing_is_said(system):
    assert next_step(system, Setting.of(1)) is None


def test_dry_run_shows_prompt_and_plan(run_cli):
    result = run_cli("tune", "dial:miniature", "--task", "miniature", "--dry-run", "--lambda", "1")
    assert result.exit_code == 0, result.stderr
    assert "would draw at most 8000 samples" in result.stderr
    assert "500 questions × 8 samples" in result.stdout


@pytest.mark.slow
def test_the_miniature_is_tuned_and_goes_on(run_cli, tmp_path: Path):
    arguments = (
        *("tune", "pair:miniature", "--task", "miniature", "--limit", "40", "--samples", "2"),
        *("--lambda", "1", "--margin", "0.3", "-o", tmp_path / "tuned", "--json"),
    )
    first = run_cli(*arguments)
    assert first.exit_code == 0, first.stderr
    stored = (tmp_path / "tuned" / "samples.jsonl").read_bytes()
    assert len(stored.splitlines()) == json.loads(first.stdout)["samples"]["spent"]
    assert run_cli(*arguments).stdout == first.stdout
    assert (tmp_path / "tuned" / "samples.jsonl").read_bytes() == stored


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ([], "SYSTEM is missing; say what is previewed"),
        (["model:miniature"], "has no two models or streams; give pair:, prompts: or dial:"),
    ],
)
def test_a_preview_needs_two_models(run_cli, tmp_path, system, message):
    result = run_cli("tune", *system, "--preview", tmp_path / "traces.jsonl")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_preview_is_a_table_that_says_where_it_leaves_both(run_cli, tmp_path):
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(json.dumps(row) + "\n" for row in make_traces(3, 0)))
    asked = ("tune", "pair:miniature", "--preview", traces, "--limit", 2)
    found = json.loads(run_cli(*asked, "--lambda", "0,1", "--json").stdout)
    shown = run_cli(*asked, "--lambda", "0,1")
    assert shown.exit_code == 0, shown.stderr
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    for row in found["rows"]:
        start = f"{row['lambda']:g} {row['divergence']:.4f} {100 * row['outside']:.3f} %"
        assert any(line.startswith(start) for line in lines), (start, lines)
    assert "at no λ here" in shown.stderr
    far = run_cli(*asked, "--lambda", "0,1,40", "--top-k", 1)
    assert "from λ = 40 on" in far.stderr


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


@pytest.mark.parametrize("system", ["dial:miniature", "pair:miniature"])
def test_too_few_questions_leave_no_folder(run_cli, system: str, tmp_path: Path):
    asked = ("--task", "miniature", "--limit", "2", "-o", tmp_path / "out")
    result = run_cli("tune", system, *asked)
    assert result.exit_code == 2
    assert "error: tune needs at least 20 different questions, got 2." in result.stderr
    assert "samples" not in result.stderr  # no bar was begun
    assert not (tmp_path / "out").exists()
