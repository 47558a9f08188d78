"""One model under two prompts, through each command."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexalign.analysis.difference import load_prompted_rows
from flexalign.cli.tune import next_step
from flexalign.data.prompting import PromptSettings
from flexalign.lambdas import Setting
from flexalign.miniature.world import SYSTEM
from flexalign.models.loading import load_model, load_tokenizer
from flexalign.models.prompted import PairRendering, PromptPair
from flexalign.systems import parse_system

MODEL = "miniature:hybrid"
TOLD = ("--aligned-prompt", f"system={SYSTEM}")
QUESTION = "9+3+6?"


def plain(question: str, system: str = "", tokens: int = 30) -> str:
    """What transformers writes greedily to a question under a system message."""
    tokenizer = load_tokenizer(MODEL)
    ids = tokenizer(f"<bos>{system}{question}", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        written = load_model(MODEL).generate(**ids, max_new_tokens=tokens, do_sample=False)
    text = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip()


@pytest.fixture
def traces(run_cli: Callable[..., Any], tmp_path: Path) -> Path:
    """Traces, sampled at λ = 1.5."""
    asked, output = tmp_path / "asked.jsonl", tmp_path / "traces.jsonl"
    rows = [{"prompt": [{"role": "user", "content": one}]} for one in (QUESTION, "1+2+3?")]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_cli(
        "sample", MODEL, *TOLD, "--lambda", "1.5", "--prompts", asked, "-o", output,
        "--max-new-tokens", 30,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return output


def test_generate_has_the_model_under_each_prompt_at_its_ends(run_cli: Callable[..., Any]) -> None:
    result = run_cli(
        "generate", MODEL, QUESTION, *TOLD, "--lambda", "0,0.5,1", "--temperature", 0,
        "--max-new-tokens", 30, "--json",
    )  # fmt: skip
    rows = json.loads(result.stdout)
    assert [row["lambda"] for row in rows] == [0, 0.5, 1]
    assert rows[0]["response"].strip() == plain(QUESTION)
    assert rows[2]["response"].strip() == plain(QUESTION, SYSTEM)


def test_chat_turns_the_dial_between_answers(
    run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [QUESTION, "/reset", "/lambda 0", QUESTION, "/lambda -1", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    result = run_cli(
        "chat", MODEL, *TOLD, "--temperature", 0, "--max-new-tokens", 30, "--lambda-range", "0,2"
    )
    told, alone = (plain(QUESTION, system) for system in (SYSTEM, ""))
    assert result.stdout.split() == [*told.split(), *alone.split()]
    assert "0 is the reference's prompt, 1 the aligned prompt" in result.stderr
    assert "outside the range [0, 2] of miniature:hybrid under two prompts" in result.stderr


def test_evaluate_and_tune_take_the_system(
    run_cli: Callable[..., Any], tmp_path: Path, traces: Path
) -> None:
    settings = ("--task", "miniature", "--limit", 2, "--samples", 1, "--max-new-tokens", 40)
    result = run_cli(
        "evaluate", f"prompts:{MODEL}", *TOLD, *settings, "--lambda", "0,1", "-o", tmp_path / "ev"
    )
    assert result.exit_code == 0, result.stderr
    summary = json.loads((tmp_path / "ev" / "summary.json").read_text())
    assert [row["lambda"] for row in summary["rows"]] == [0, 1]
    described = json.loads((tmp_path / "ev" / "run.json").read_text())
    prompts = {"reference": {}, "aligned": {"system": SYSTEM}}
    assert described["configuration"]["systems"][0]["prompts"] == prompts

    result = run_cli("tune", f"prompts:{MODEL}", *TOLD, *settings, "--dry-run")
    assert f"[aligned]\n<bos>{SYSTEM}" in result.stderr
    result = run_cli(
        "tune", f"prompts:{MODEL}", *TOLD, "--preview", traces, "--lambda", "0,1,2", "--json"
    )
    rows = json.loads(result.stdout)["rows"]
    assert rows[0]["divergence"] == pytest.approx(0, abs=1e-9)
    assert 0 < rows[1]["divergence"] < rows[2]["divergence"]


TOO_LONG = ("--aligned-prompt", "system=" + "check ; " * 600)


@pytest.mark.parametrize(
    "command",
    [
        ("chat", MODEL),
        ("serve", MODEL, "--port", 0),
        ("generate", MODEL, QUESTION),
        ("evaluate", f"prompts:{MODEL}", "--task", "miniature", "--lambda", 0.5, "-o", "out"),
        ("tune", f"prompts:{MODEL}", "--task", "miniature", "--limit", 20, "-o", "out"),
    ],
    ids=lambda command: command[0],
)
def test_a_prompt_that_fills_the_context_alone_is_refused_at_the_start(
    run_cli: Callable[..., Any],
    command: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("9+3+6?\n"))
    result = run_cli(*command, *TOO_LONG)
    assert result.exit_code == 2
    error = result.stderr.strip()
    assert error.startswith("error: the aligned prompt has 12")
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "tune"])
def test_a_question_beyond_the_context_leaves_no_folder(
    run_cli: Callable[..., Any], command: str, tmp_path: Path
) -> None:
    rows = [{"problem": f"{n}+1?", "answer": str(n + 1)} for n in range(20)]
    rows[13]["problem"] = "+".join("1" * 600) + "?"
    task, output = tmp_path / "q.jsonl", tmp_path / "out"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--task", task, "--lambda", "0.5", "--samples", 1, "--max-new-tokens", 5)
    result = run_cli(command, f"prompts:{MODEL}", *TOLD, *asked, "-o", output)
    assert result.exit_code == 2
    assert "question 14 of q: the prompt has" in result.stderr
    assert "samples" not in result.stderr  # no bar was begun
    assert not output.exists()


def test_tune_says_how_to_go_on() -> None:
    prompts = PromptPair(
        PromptSettings({"enable_thinking": True}), PromptSettings(system="Be brief.")
    )
    following = next_step(parse_system("prompts:models/base"), Setting.of(0.5), prompts)
    assert following == (
        "flexalign generate models/base --reference-prompt enable_thinking=true --aligned-prompt "
        "'system=Be brief.' --lambda 0.5"
    )


def test_traces_keep_the_prompt_that_a_student_is_asked(traces: Path) -> None:
    row = json.loads(traces.read_text().splitlines()[0])
    assert row["prompt"] == [{"role": "user", "content": QUESTION}]
    (manifest,) = [one for one in traces.parent.glob("traces.jsonl*") if one != traces]
    source = json.loads(manifest.read_text())["source"]
    assert source["prompts"]["aligned"] == {"system": SYSTEM}
    assert source["lambda"]["lambda"] == 1.5


def test_inspect_shows_both_prompts_and_what_they_turn(
    run_cli: Callable[..., Any], traces: Path
) -> None:
    result = run_cli("inspect", MODEL, *TOLD, "--diff", traces, "--json")
    shown = json.loads(result.stdout)
    assert shown["rendered"]["reference"]["text"] == "<bos>…"
    assert shown["rendered"]["aligned"]["text"] == f"<bos>{SYSTEM}…"
    assert shown["prompts"] == {"reference": {}, "aligned": {"system": SYSTEM}}
    assert shown["difference"]["rows"] == 2
    assert 0 < shown["difference"]["variation"] < 1
    result = run_cli("inspect", MODEL, *TOLD)
    assert "the aligned prompt, 4 tokens, thinking free" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", MODEL, QUESTION, *TOLD, "--aligned", MODEL), "leave them out, or --aligned"),
        (("generate", MODEL, QUESTION, "--aligned-prompt", "brief"), "write KEY=VALUE"),
        (("generate", MODEL, QUESTION, "--aligned-prompt", "x=1"), "which the chat template does"),
        (("generate", MODEL, QUESTION, *TOLD, "--lambda", "-1"), "λ"),
        (("inspect", MODEL, "miniature", *TOLD), "a dial of one model"),
        (("evaluate", f"prompts:{MODEL}", "--task", "miniature", "--dry-run"), "needs two prompts"),
        (
            ("evaluate", f"model:{MODEL}", *TOLD, "--task", "miniature", "--dry-run"),
            "about a system prompts:MODEL",
        ),
        (("serve", MODEL, *TOLD, "--engine", "vllm"), "served by --engine local alone"),
        (("sample", MODEL, "--lambda", "1", "--prompts", "a", "-o", "b"), "give --aligned-prompt"),
        (("sample", MODEL, *TOLD, "--plain", "--prompts", "a", "-o", "b"), "--plain has no"),
        (("sample", "--endpoint", "http://x", *TOLD, "--prompts", "a", "-o", "b"), "--endpoint"),
    ],
)
def test_what_cannot_be_is_refused(
    run_cli: Callable[..., Any], arguments: tuple[str, ...], message: str
) -> None:
    result = run_cli(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_equal_prompts_are_noted(run_cli: Callable[..., Any]) -> None:
    same = ("--reference-prompt", f"system={SYSTEM}", *TOLD)
    result = run_cli("generate", MODEL, QUESTION, *same, "--max-new-tokens", 1)
    assert result.exit_code == 0
    assert "nothing to turn" in " ".join(result.stderr.split())


def test_sampled_rows_are_what_a_student_is_asked(
    run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Where the reference has a system message too, sample, inspect and realign agree on it."""
    both = ("--reference-prompt", "system=check check ;", *TOLD)
    asked, output = tmp_path / "asked.jsonl", tmp_path / "traces.jsonl"
    asked.write_text(json.dumps({"problem": QUESTION}) + "\n")
    sampled = run_cli(
        "sample", MODEL, *both, "--prompts", asked, "-o", output, "--max-new-tokens", 30,
        "--temperature", 0,
    )  # fmt: skip
    assert sampled.exit_code == 0, sampled.stderr
    row = json.loads(output.read_text())
    system = {"role": "system", "content": "check check ;"}
    assert row["prompt"] == [system, {"role": "user", "content": QUESTION}]
    assert row["completion"][0]["content"].strip() == plain(QUESTION, SYSTEM)

    # The reader strips the reference's message from the aligned side again.
    prompts = PromptPair(PromptSettings(system="check check ;"), PromptSettings(system=SYSTEM))
    tokenizer = load_tokenizer(MODEL)
    ((reference, _, aligned),) = load_prompted_rows(output, PairRendering(tokenizer, prompts))
    assert tokenizer.decode(reference).startswith("<bos> check check ; 9")
    assert tokenizer.decode(aligned).startswith("<bos> check ; 9")

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"reference: {MODEL}\naligned: {MODEL}\ndata: {output}\noutput: {tmp_path / 'student'}\n"
        "lambda: 1\nlora: {r: 4}\ntraining: {max_steps: 1}\n"
    )
    planned = run_cli("realign", recipe, *both, "--dry-run")
    assert planned.exit_code == 0, planned.stderr


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1+2?"}, {"prompt": QUESTION}], "row 1: the prompt is plain text"),
        ([{"problem": "1+2?"}, {"problem": QUESTION * 200}], "row 2: the prompt has 1201 tokens"),
    ],
)
def test_sample_refuses_a_prompt_before_it_loads_the_model(
    run_cli: Callable[..., Any], tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    asked, output = tmp_path / "asked.jsonl", tmp_path / "traces.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_cli("sample", MODEL, *TOLD, "--prompts", asked, "-o", output)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not output.exists()
