import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flexalign.systems.conversation
from flexalign.calibration.effort import Calibration, copy_adapter, store_calibration
from flexalign.cli.console import describe_choice, round_beside
from flexalign.data.logits import LogitsSettings
from flexalign.lambdas import Adaptive, Fixed, Route, Setting
from flexalign.miniature import folder

DIAL = ("miniature", "--adapter", "miniature:fast", "--temperature", "1", "--top-p", "1")


@pytest.fixture
def chat(run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Pipe lines into a chat."""

    def run(*lines: str, arguments: tuple[object, ...] = DIAL) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return run_cli("chat", *arguments)

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the model is asked, call by call."""
    calls: list[dict[str, Any]] = []
    real = flexalign.systems.conversation.generate_responses

    def spy(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        calls.append({"messages": [dict(one) for one in prompts[0]], **options})
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(flexalign.systems.conversation, "generate_responses", spy)
    return calls


def told(result: Any) -> list[str]:
    return [line for line in result.stderr.splitlines() if not line.startswith("Loading")]


def test_exits_are_streamed_and_told(chat: Callable[..., Any]) -> None:
    exits = [json.dumps({"policy": "exit", "threshold": at, "marker": ";"}) for at in (0, 1)]
    result = chat(f"/policy {exits[0]}", "9+3+6?", f"/policy {exits[1]}", "9+3+6?")
    assert result.exit_code == 0, result.stderr
    at_once, never = result.stdout.splitlines()
    assert at_once.count(";") == 1 < never.count(";")
    _, _, first, _, second = told(result)
    assert "exit: confidence" in first
    assert "no exit: last trial answer's confidence" in second
    assert " rejected)" in second


def test_the_dial_turns_in_mid_conversation(chat: Callable[..., Any]) -> None:
    result = chat("9+3+6?", "/lambda 1", "9+3+6?", "/policy adaptive 0", "9+3+6?")
    assert result.exit_code == 0, result.stderr
    slow, fast, adaptive = result.stdout.splitlines()
    assert slow.startswith("<think> #1 9 + 3 = ")
    assert slow.split()[-2] == "</think>"
    assert fast.startswith("<think> </think> ")
    assert adaptive.startswith("<think> </think> ")
    start, slow_cost, turned, fast_cost, policy, adaptive_cost = told(result)
    meaning = "0 is the base model, 1 the adapter whole"
    assert start.startswith(f"λ=0; λ: {meaning}; it may go from 0 to 1. /help")
    tokens = len(slow.split())
    assert slow_cost.startswith(f"λ=0 · {tokens} tokens ({tokens - 3} thinking + 3 answer) · ")
    assert (turned, policy) == ("λ=1", "adaptive 0")
    assert fast_cost.startswith("λ=1 · 3 tokens · ")
    assert adaptive_cost.startswith("adaptive 0 · fast: confidence 0.")
    assert " ≥ 0 · 3 tokens · " in adaptive_cost


def test_limits_and_penalties_reach_the_model(
    chat: Callable[..., Any], asked: list[dict[str, Any]]
) -> None:
    limits = ("--top-k", "20", "--min-p", "0.1", "--frequency-penalty", "0.5")
    assert chat("9+3+6?", arguments=(*DIAL, *limits)).exit_code == 0
    assert asked[0]["logits"] == LogitsSettings(top_k=20, min_p=0.1, frequency_penalty=0.5)


def test_a_rejected_fast_answer_is_told_and_counted(chat: Callable[..., Any]) -> None:
    result = chat("9+3+6?", arguments=(*DIAL, "--policy", "adaptive 1"))
    (cost,) = told(result)[1:]
    written = len(result.stdout.split())
    assert "slow: fast answer's confidence 0." in cost
    assert " < 1 · " in cost
    rejected = int(cost.split(" rejected")[0].split()[-1])
    assert rejected > 0
    assert f" {written + rejected} tokens (" in cost


def test_wrong_commands_are_one_sentence_and_the_conversation_goes_on(
    chat: Callable[..., Any],
) -> None:
    wrong = {
        "/lambda 7": "λ=7: outside the range [0, 1] of the adapter miniature:fast; if you mean it, "
        "leave with /quit and start again with --lambda-range LEAST,LARGEST; else give a λ inside it.",
        "/lambda nan": "/lambda takes one finite number, such as 0.3; got 'nan'",
        "/lambda 0,1": "/lambda takes one finite number",
        "/policy adaptive 3": "must be a number in [0, 1]",
        '/policy {"policy": "route", "share": 0.5, "fast_lambda": 9}': "outside the range",
        "/policy adaptiv": "is no λ and no policy; write",
        "/lamda 1": "there is no command /lamda; /help lists them",
    }
    result = chat(*wrong, "/lambda", "/help", "9+3+6?")
    assert result.exit_code == 0
    _, *errors = told(result)[: len(wrong) + 1]
    for said, line in zip(wrong.values(), errors, strict=True):
        assert line.startswith("error: ")
        assert said in line
    assert told(result)[len(wrong) + 1] == "λ=0"
    assert "/policy adaptive 0.5" in result.stderr
    assert "</think>" in result.stdout


def test_the_history_has_no_thinking(chat: Callable[..., Any], asked: list[dict[str, Any]]) -> None:
    result = chat("9+3+6?", "4+4+8?", "/system add", "1+2+3?", "/reset", "/system", "5+5+5?")
    first, second, *_ = [line.split()[-1] for line in result.stdout.splitlines()]
    history = [
        {"role": "user", "content": "9+3+6?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "4+4+8?"},
        {"role": "assistant", "content": second},
    ]
    assert asked[1]["messages"] == history[:3]
    system = {"role": "system", "content": "add"}
    assert asked[2]["messages"] == [system, *history, {"role": "user", "content": "1+2+3?"}]
    assert asked[3]["messages"] == [{"role": "user", "content": "5+5+5?"}]
    assert len({call["seed"] for call in asked}) == 4


def test_ctrl_c_stops_an_answer_and_keeps_what_stands(
    chat: Callable[..., Any], asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = flexalign.systems.conversation.generate_responses
    written = iter(["<think> 1 </think> 7", "<think> 1", None])

    def broken_off(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        text = next(written)
        if text is None:
            return spy(model, tokenizer, prompts, **options)
        options["streamer"].put(torch.zeros(1, 5, dtype=torch.long))
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            options["streamer"].put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr(flexalign.systems.conversation, "generate_responses", broken_off)
    result = chat("1+2+4?", "2+2+2?", "1+2+3?")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[:2] == ["<think> 1 </think> 7", "<think> 1"]
    assert result.stderr.count("stopped") == 2
    assert result.stderr.count("the question is not kept") == 1
    assert asked[0]["messages"] == [
        {"role": "user", "content": "1+2+4?"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "1+2+3?"},
    ]


def test_a_plain_model_talks_and_has_no_dial(chat: Callable[..., Any], tiny_pair: Any) -> None:
    arguments = (tiny_pair.reference, "--max-new-tokens", 4)
    result = chat("hello", "/lambda 1", "/quit", "unheard", arguments=arguments)
    assert result.exit_code == 0, result.stderr
    assert "λ=1 needs a dial, and the model alone has none" in result.stderr
    assert result.stderr.count("tokens/s") == 1
    assert "cut off" in result.stderr


def test_a_pair_begins_at_the_aligned_model(chat: Callable[..., Any], tiny_pair: Any) -> None:
    arguments = (tiny_pair.reference, "--aligned", tiny_pair.aligned, "--max-new-tokens", 4)
    result = chat("hello", "/lambda -1", "/lambda 2.5", "hello", arguments=arguments)
    assert "λ=-1: λ < 0 leads away from the aligned model" in result.stderr
    assert "λ=1; λ: 0 is the reference, 1 the aligned model. /help" in result.stderr
    assert "λ=2.5 · 4 tokens" in result.stderr


def test_a_terminal_is_read_by_input(
    run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    typed = iter([KeyboardInterrupt, "/lambda", "", EOFError])

    def type_line(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_line)
    result = run_cli("chat", *DIAL)
    assert result.exit_code == 0
    assert "Ctrl-D or /quit leaves" in result.stderr
    assert told(result)[-1] == "λ=0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*DIAL, "--lambda", "2"), "outside the range [0, 1]"),
        ((*DIAL, "--lambda", "0,1"), "begins with one setting"),
        (("miniature", "--policy", "adaptive 0.5"), "needs a dial"),
        ((*DIAL, "--policy", "ladder 0.5"), "ladder 0.5 gives each question weights of its own"),
        (("nowhere",), "there is no model 'nowhere'"),
    ],
)
def test_wrong_options_end_it_before_it_begins(
    chat: Callable[..., Any], arguments: tuple[object, ...], said: str
) -> None:
    result = chat("hello", arguments=arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""


@pytest.mark.full
def test_a_signal_stops_the_answer_and_no_more() -> None:
    greedy = ("--temperature", "0", "--max-new-tokens", "100000")  # it goes over one line for ever
    command = "from flexalign.cli.app import main; main()"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", command, "chat", *DIAL[:3], *greedy],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
    ) as process:
        process.stdin.write(b"9+3+6?\n")
        process.stdin.flush()
        assert process.stdout.read(20).startswith(b"<think>")
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"/lambda 1\n9+3+6?\n")
        process.stdin.close()
        answers, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0, errors
    assert answers.splitlines()[-1].startswith(b"<think> </think> ")
    assert b"stopped" in errors


@pytest.mark.parametrize(
    ("confidence", "threshold", "shown"),
    [(0.834, 0.5, "0.83"), (0.9987, 1, "0.999"), (0.99999, 1, "0.99999"), (0.4999, 0.5, "0.4999")],
)
def test_a_rounded_confidence_stays_on_its_side(
    confidence: float, threshold: float, shown: str
) -> None:
    assert round_beside(confidence, threshold) == shown


@pytest.mark.parametrize(
    ("policy", "answer", "said"),
    [
        (Adaptive(0.5), {"route": "fast", "confidence": 0.75}, "fast: confidence 0.75 ≥ 0.5"),
        (
            Adaptive(0.5),
            {"route": "slow", "confidence": 0.25},
            "slow: fast answer's confidence 0.25 < 0.5",
        ),
        (
            Adaptive(0.5),
            {"route": "slow", "confidence": 0.75},
            "slow: the fast answer did not come to its end",
        ),
        (Route(0.5), {"route": "slow", "confidence": None}, "slow: by the coin"),
        (Fixed(0.5), {"route": None, "confidence": None}, None),
    ],
)
def test_the_way_that_was_taken_is_said_with_its_reason(
    policy: Any, answer: dict[str, Any], said: str | None
) -> None:
    model = SimpleNamespace(threshold=lambda policy: policy.threshold)
    assert describe_choice(SimpleNamespace(**answer), Setting.of(policy), model) == said


def test_effort_turns_where_the_adapter_is_calibrated(
    chat: Callable[..., Any], tmp_path: Path
) -> None:
    copy_adapter(folder("fast"), tmp_path / "fast")
    effort = {"thresholds": [[0.0, 0.0], [100.0, 0.8]], "lambdas": [[100.0, 0.0]]}
    calibration = {"version": 1, "measure": "answer_probability", "lambda_range": [0.0, 1.0]}
    calibration |= {"holes": [], "effort": effort}
    store_calibration(tmp_path / "fast", Calibration.from_json(calibration))
    dial = ("miniature", "--adapter", tmp_path / "fast", "--temperature", "0")
    result = chat("/effort 0,50", "/effort 50", "/effort 100", arguments=dial)
    assert result.exit_code == 0, result.stderr
    turned = [line for line in told(result)[1:] if not line.startswith("effort ")]
    assert turned[0] == "error: a conversation has one effort at a time; got '0,50'."
    assert [line.split(";")[0] for line in turned[1:]] == ["adaptive 0.4", "λ=0"]
