import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"what is {n} plus two", "answer": n + 2} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def arguments(questions, tiny_pair, tmp_path) -> list[str]:
    return [
        f"pair=pair:{tiny_pair.reference},{tiny_pair.aligned}",
        *("--task", str(questions), "--lambda", "0,1", "--samples", "2"),
        *("--max-new-tokens", "5", "--output", str(tmp_path / "out")),
    ]


@pytest.mark.parametrize(
    ("given", "is_said"),
    [((), True), (("--instruction", ""), False), (("--instruction", "Think."), False)],
)
def test_an_instruction_that_nobody_chose_is_said(run_cli, arguments, given, is_said) -> None:
    data = arguments[arguments.index("--task") + 1]
    public = [*arguments, "--task", "math500", "--data", data]
    result = run_cli("evaluate", *public, "--dry-run", *given)
    assert result.exit_code == 0, result.stderr
    said = "followed by: Please reason step by step, and put your final answer within \\boxed{}."
    assert (said in result.stderr) == is_said


def test_a_sweep_prints_and_writes_its_summary(run_cli, arguments, tmp_path) -> None:
    result = run_cli("evaluate", *arguments)
    assert result.exit_code == 0, result.stderr
    assert "pair on sums" in result.stdout
    assert "λ=1" in result.stdout
    assert "12 of 12 samples, 12 made now" in result.stderr
    again = run_cli("evaluate", *arguments, "--json")
    assert "12 of 12 samples, 0 made now" in again.stderr
    assert json.loads(again.stdout) == json.loads((tmp_path / "out" / "summary.json").read_text())
    run = json.loads((tmp_path / "out" / "run.json").read_text())["configuration"]
    sampling = {"samples": 2, "seed": 0, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 5}
    assert run["sampling"] == sampling | {"gate": None}


def test_stored_samples_are_graded_again(run_cli, arguments, tmp_path) -> None:
    run_cli("evaluate", *arguments)
    result = run_cli("evaluate", "--regrade", "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert "0 grades have changed" in result.stderr
    wrong = run_cli("evaluate", "--regrade", *arguments)
    assert wrong.exit_code == 2
    assert "samples nothing" in wrong.stderr


@pytest.mark.parametrize(
    "option", [("--dry-run",), ("--baseline", "pair"), ("--lambda", "0,1"), ("--top-k", "20")]
)
def test_what_grading_again_does_not_read_is_refused(run_cli, arguments, tmp_path, option) -> None:
    run_cli("evaluate", *arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    wrong = run_cli("evaluate", "--regrade", "--output", tmp_path / "out", *option)
    assert wrong.exit_code == 2
    assert f"{option[0]} has no meaning with --regrade" in wrong.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_dry_run_shows_prompts_and_cost(run_cli, arguments, tmp_path) -> None:
    result = run_cli("evaluate", *arguments, "--policy", "route 0.5", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "<|im_start|>user\nwhat is 0 plus two<|im_end|>" in result.stderr
    assert "pair: λ=0, λ=1, route 0.5" in result.stderr
    assert "would make 18 samples, at most 90 tokens" in result.stderr
    assert not (tmp_path / "out").exists()
    shown = json.loads(run_cli("evaluate", *arguments, "--dry-run", "--json").stdout)
    assert (shown["samples"], shown["tokens_at_most"]) == (12, 60)
    assert [prompt["system"] for prompt in shown["prompts"]] == ["pair"]


def test_answers_that_cannot_be_read_are_listed_first(run_cli, arguments, questions) -> None:
    with questions.open("a") as file:
        file.write(json.dumps({"problem": "what", "answer": "\\frac{1"}) + "\n")
    result = run_cli("evaluate", *arguments, "--dry-run", "--json")
    assert "1 known answers cannot be read" in result.stderr
    assert "sums, question 4: \\frac{1" in result.stderr
    assert [row["question"] for row in json.loads(result.stdout)["unreadable_golds"]] == ["4"]


@pytest.mark.parametrize(
    ("question", "answer", "instruction", "is_said"),
    [
        ("which city", "Paris", "", True),
        ("which city", "Paris", "Be brief.", True),
        ("which city", "Paris", "Put your final answer within \\boxed{}.", False),
        ("which city, in \\boxed{}", "Paris", "", False),
        ("how many", "7", "", False),
    ],
)
def test_answers_in_words_that_nothing_boxes_are_said_before(
    run_cli, arguments, questions, question, answer, instruction, is_said
) -> None:
    with questions.open("a") as file:
        file.write(json.dumps({"problem": question, "answer": answer}) + "\n")
    result = run_cli("evaluate", *arguments, "--dry-run", "--instruction", instruction)
    assert result.exit_code == 0, result.stderr
    said = "note: sums: 1 of 4 known answers are words, such as 'Paris'"
    assert (said in result.stderr) == is_said


@pytest.mark.parametrize(("given", "below"), [("Be brief.", "\n\nBe brief."), ("", "")])
def test_an_instruction_of_ones_own_stands_below_the_question(
    run_cli, arguments, given, below
) -> None:
    shown = run_cli("evaluate", *arguments, "--dry-run", "--json", "--instruction", given)
    prompt = json.loads(shown.stdout)["prompts"][0]["prompt"]
    assert f"what is 0 plus two{below}<" in prompt
    assert "boxed" not in prompt


def test_systems_without_the_reference_are_named_before_they_run(
    run_cli, arguments, tiny_pair
) -> None:
    alone = (f"student=model:{tiny_pair.aligned}", "--dry-run")
    result = run_cli("evaluate", *arguments, *alone)
    assert "note: student: no λ = 0 there" in result.stderr
    told = run_cli("evaluate", *arguments, *alone, "--baseline", "pair")
    assert "no λ = 0" not in told.stderr


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (["--lambda", "0,nan"], "'nan' is not a finite number"),
        (["--lambda", "0,0"], "λ=0 is given twice"),
        (["--policy", "adaptive much"], "'much' is not a number"),
        (["--policy", "{half"], "is no JSON"),
        (["--lambda-range", "2,1"], "LEAST,LARGEST"),
        (["--lambda", "0,-0.5"], "λ=-0.5: λ < 0 leads away from the aligned model"),
        (["--lambda", "0,3", "--lambda-range", "-1,2"], "outside the range [-1, 2] of the pair"),
        (["--task", "nowhere.jsonl"], "no task and no file 'nowhere.jsonl'"),
        (["--task", "miniature"], "differ in their usual temperature"),
        (["--baseline", "x"], "'x' is none of the systems: pair"),
        (["--api-key-env", "NO_SUCH_KEY"], "'NO_SUCH_KEY' is not set"),
        (["second"], "'second' is no system"),
        (["--engine", "vllm"], "runs plain models"),
        (["--policy", "ladder 0.9,0.6"], "no system here can be set to ladder 0.9,0.6"),
        (["--policy", "ladder 0.6,0.9"], "a ladder's thresholds must descend, got 0.6,0.9"),
        (["--temperature", "nan"], "temperature must be a number ≥ 0 (0 is greedy), got nan"),
        (["--top-k", "-1"], "top_k must be a whole number ≥ 0 (0: all), got -1"),
        (["--min-p", "1.5"], "min_p must be between 0 and 1, got 1.5"),
        (["--repetition-penalty", "0"], "repetition_penalty must be a number above 0, got 0.0"),
        (["--presence-penalty", "nan"], "presence_penalty must be a finite number, got nan"),
    ],
)
def test_bad_input_is_one_sentence(run_cli, arguments, extra, problem) -> None:
    result = run_cli("evaluate", *arguments, *extra)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert "Traceback" not in result.stderr


def test_a_task_with_a_missing_field_is_named_by_line(run_cli, arguments, questions) -> None:
    with questions.open("a") as file:
        file.write(json.dumps({"problem": "what"}) + "\n")
    result = run_cli("evaluate", *arguments)
    assert result.exit_code == 2
    assert "sums.jsonl" in result.stderr
    assert "line 4: no field `answer`" in result.stderr


def test_a_folder_of_another_run_is_refused(run_cli, arguments) -> None:
    run_cli("evaluate", *arguments)
    result = run_cli("evaluate", *arguments, "--seed", "5")
    assert result.exit_code == 2
    assert "sampling.seed: 0 there, 5 asked" in result.stderr
    result = run_cli("evaluate", *arguments, "--top-k", "20")
    assert result.exit_code == 2
    assert "sampling.top_k" in result.stderr


def test_a_sample_without_a_response_is_reported(run_cli, serve, questions, tmp_path) -> None:
    def answer(path, body):
        if "1 plus two" in body["messages"][0]["content"]:
            return 422, b"no"
        choice = {"message": {"content": "\\boxed{2}"}, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 3}}

    system = f"server=url:{serve(answer).url}"
    command = ["evaluate", system, "--task", questions, "-n", "1", "-o", tmp_path / "out"]
    result = run_cli(*command, "--model-name", "m")
    assert result.exit_code == 1
    assert "1 of 3 samples got no response (question 2 of sums" in result.stderr
    assert "422 no" in result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows"][0]["n_samples"] == 2


def test_a_server_that_is_not_there_is_said(run_cli, questions, tmp_path) -> None:
    command = ["evaluate", "url:http://127.0.0.1:9/v1", "--task", questions, "-o", tmp_path / "out"]
    result = run_cli(*command, "--attempts", "1")
    assert result.exit_code == 1
    assert "127.0.0.1:9/v1 gave no response in 1 attempts" in result.stderr
    assert "Traceback" not in result.stderr


def test_runs_are_compared(run_cli, arguments, tmp_path) -> None:
    run_cli("evaluate", *arguments)
    run_cli("evaluate", *arguments, "--seed", "1", "--output", tmp_path / "other")
    result = run_cli("compare", tmp_path / "out", tmp_path / "other", "--json")
    assert result.exit_code == 0, result.stderr
    assert {row["system"] for row in json.loads(result.stdout)["rows"]} == {
        "out/pair",
        "other/pair",
    }
    assert "other/pair" in run_cli("compare", tmp_path / "out", tmp_path / "other").stdout
    missing = run_cli("compare", tmp_path)
    assert missing.exit_code == 2
    assert "has no summary.json" in missing.stderr
    twice = run_cli("compare", tmp_path / "out", tmp_path / "out")
    assert "named twice" in twice.stderr


@pytest.mark.slow
def test_the_miniature_is_swept(run_cli, tmp_path) -> None:
    command = ["evaluate", "pair:miniature", "--task", "miniature", "--limit", "20", "-n", "1"]
    result = run_cli(*command, "--lambda", "0,1", "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    slow, fast = json.loads(result.stdout)["rows"]
    assert slow["accuracy"] > 0.5
    assert fast["token_cut"] > 0.1
    assert slow["unparsed"] == slow["truncated"] == 0
    assert slow["thinking_tokens"] < slow["tokens"]


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    program = "from flexalign.cli.app import main; main()"
    command = [sys.executable, "-c", program, "evaluate", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


def _wait_for_samples(path: Path, process: subprocess.Popen[str], least: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < least:
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.full
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_sweep_ends_as_an_uninterrupted_one(arguments, tmp_path, death) -> None:
    options = [*arguments, "--batch-size", "2", "--samples", "8", "--max-new-tokens", "24"]
    _finish(_start([*options, "--output", str(tmp_path / "whole")]))
    samples = tmp_path / "out" / "samples.jsonl"
    for least in (4, 20):
        process = _start(options)
        _wait_for_samples(samples, process, least)
        os.kill(process.pid, death)
        _, errors = process.communicate(timeout=60)
        if death == signal.SIGINT:
            assert process.returncode == 130
            assert "give the same command again to go on" in errors
    assert not (tmp_path / "out" / "summary.json").exists()
    _finish(_start(options))
    for name in ("samples.jsonl", "summary.json", "questions.jsonl"):
        content = (tmp_path / "out" / name).read_bytes()
        assert content == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["pair:miniature"], "name at least one SYSTEM and one --task"),
        (["--task", "miniature"], "name at least one SYSTEM and one --task"),
        (["pair:miniature", "--task", "miniature"], "name the folder of the results with --output"),
        (
            ["a=dial:miniature", "b=dial:miniature", "--task", "miniature", "--effort", "50"],
            "an effort is another setting for each adapter",
        ),
    ],
)
def test_what_is_missing_or_too_much_is_said(run_cli, tmp_path, given, problem) -> None:
    output = ["--output", tmp_path / "out"] if "--effort" in given else []
    result = run_cli("evaluate", *given, *output)
    assert (result.exit_code, problem in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name_are_told_apart_by_none(run_cli, arguments, questions, tmp_path):
    other = tmp_path / "deeper" / questions.name
    other.parent.mkdir()
    other.write_bytes(questions.read_bytes())
    result = run_cli("evaluate", *arguments, "--task", other)
    assert result.exit_code == 2
    assert "a task is given twice, or two files have one name: ['sums', 'sums']" in result.stderr


def test_several_tasks_end_in_their_means(run_cli, arguments, questions, tmp_path) -> None:
    other = tmp_path / "more.jsonl"
    other.write_bytes(questions.read_bytes())
    result = run_cli("evaluate", *arguments, "--task", other)
    assert result.exit_code == 0, result.stderr
    table, means = result.stdout.split("accuracy, mean")
    assert {line.split()[0] for line in table.splitlines() if "λ=" in line} == {"sums", "more"}
    assert "cut, pooled" in means
    again = run_cli("evaluate", "--regrade", "--output", tmp_path / "out", "--json")
    summary = json.loads(again.stdout)
    assert [mean["setting"] for mean in summary["means"]] == ["λ=0", "λ=1"]
    assert f"{100 * summary['means'][1]['token_cut_pooled']:.1f}" in means


def test_few_samples_of_aime_are_warned_of(run_cli, arguments, tmp_path) -> None:
    rows = [{"ID": f"2024-I-{n}", "problem": "1+1?", "answer": 2} for n in range(30)]
    (tmp_path / "aime.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*arguments, "--task", tmp_path / "aime.jsonl", "--dry-run"]
    result = run_cli("evaluate", *command)
    assert "note: aime has 30 questions, one of which is 3.3 points" in result.stderr


@pytest.mark.parametrize("text", ["{", "[1, 2]", "{}", '{"rows": [{}]}'])
def test_a_damaged_summary_is_said_with_the_way_to_mend_it(run_cli, tmp_path, text) -> None:
    (tmp_path / "summary.json").write_text(text)
    result = run_cli("compare", tmp_path)
    assert result.exit_code == 2, result.stderr
    assert "is damaged" in result.stderr
    assert "flexalign evaluate --regrade" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "lora:miniature:reference,miniature:aligned", "--lambda", 1),
        ("evaluate", "dial:miniature:reference,miniature:aligned"),
        ("tune", "dial:miniature:reference,miniature:aligned", "--margin", 0.02),
    ],
    ids=str,
)
def test_a_whole_model_in_the_place_of_a_dial_is_wrong_input(
    run_cli, weightless, tmp_path, command
) -> None:
    result = run_cli(
        *command, "--task", "miniature", "--limit", 4, "--samples", 2, "-o", tmp_path / "x"
    )
    assert result.exit_code == 2
    assert "it is a whole model; two whole models are pair:REF,ALIGNED" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_a_whole_model_as_the_adapter_is_wrong_input(run_cli, weightless, command) -> None:
    prompt = ["hello"] if command == "generate" else []
    result = run_cli(command, "miniature", *prompt, "--adapter", "miniature:aligned")
    assert result.exit_code == 2
    assert "pair:REF,ALIGNED, or --aligned instead of --adapter." in result.stderr
