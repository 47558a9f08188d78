import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from counting import count_lambda
from flexalign.calibration.effort import Calibration, MeasuredSetting, SettingMetrics
from flexalign.inra.configuration import CONFIG_FILE, WEIGHTS_FILE
from flexalign.miniature import folder
from flexalign.models.loading import load_model, load_tokenizer
from flexalign.statistics import Interval
from flexalign.systems import LocalBackend

DIAL = ("miniature", "--adapter", "miniature:fast")
QUESTION = "9+3+6?"
SAMPLED = ("--temperature", 1, "--top-p", 1)


@pytest.fixture
def generate(run_cli: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: object) -> Any:
        return run_cli("generate", *arguments)

    return run


@pytest.fixture
def rows(generate: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """Run with ``--json``; return its rows."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        result = generate(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return list(json.loads(result.stdout))

    return run


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def count(text: str) -> int:
    """Tokens of a text; the miniature's responses are their tokens with spaces between."""
    return len(text.split())


def test_the_slow_end_is_the_plain_model(rows: Callable[..., Any]) -> None:
    model, tokenizer = load_model("miniature"), load_tokenizer("miniature")
    ids = tokenizer("<bos>" + QUESTION, add_special_tokens=False, return_tensors="pt")["input_ids"]
    greedy = ("--temperature", 0, "--max-new-tokens", 30)
    slow, fast = rows(*DIAL, QUESTION, "--lambda", "0,1", *greedy)
    with torch.no_grad():
        written = model.generate(ids, do_sample=False, max_new_tokens=30)[0, ids.shape[1] :]
    assert slow["response"] == tokenizer.decode(written, skip_special_tokens=True)
    assert slow["truncated"]
    assert slow["thinking_tokens"] == 29
    assert count(fast["response"]) == fast["tokens"] == 3


def test_a_row_says_what_was_written(rows: Callable[..., Any]) -> None:
    slow, fast = rows(*DIAL, QUESTION, "--lambda", "0,1", *SAMPLED)
    assert (slow["setting"], slow["lambda"], slow["policy"]) == ("λ=0", 0.0, None)
    assert slow["prompt"] == fast["prompt"] == QUESTION
    assert slow["tokens"] == count(slow["response"])
    assert slow["thinking_tokens"] == slow["response"].split().index("</think>") - 1
    assert fast["tokens"] == count(fast["response"]) < slow["tokens"]
    assert slow["response"].split()[-1] == "18"
    assert slow["tokens_per_second"] > 0
    assert (slow["route"], slow["confidence"], slow["rejected_tokens"]) == (None, None, 0)


def test_a_policy_tells_its_way_and_counts_what_it_rejects(rows: Callable[..., Any]) -> None:
    policies = [f"adaptive {threshold}" for threshold in (0, 1)]
    fast, slow = rows(*DIAL, QUESTION, "--policy", policies[0], "--policy", policies[1], *SAMPLED)
    assert (fast["route"], slow["route"]) == ("fast", "slow")
    assert fast["policy"] == {"policy": "adaptive", "threshold": 0.0}
    assert fast["rejected_tokens"] == 0
    assert 0 < slow["rejected_tokens"] == slow["tokens"] - count(slow["response"])
    assert 0 <= slow["confidence"] < 1
    assert slow["setting"] == "adaptive 1"
    ways = {
        row["route"] for row in rows(*DIAL, QUESTION, "--policy", "route 0.5", "-n", 12, *SAMPLED)
    }
    assert ways == {"fast", "slow"}


def test_exits_are_told_and_need_no_dial(generate: Any, rows: Callable[..., Any]) -> None:
    policy = json.dumps({"policy": "exit", "threshold": 1, "marker": ";"})
    at_once, never = rows(
        *DIAL, QUESTION, "--policy", policy.replace("1", "0"), "--policy", policy, *SAMPLED
    )
    assert (at_once["route"], never["route"]) == ("fast", "slow")
    assert at_once["response"].count(";") == 1
    assert at_once["rejected_tokens"] == 0
    assert 0 < never["rejected_tokens"] == never["tokens"] - count(never["response"])
    assert never["setting"] == "exit 1 marker=;"

    (plain,) = rows("miniature", QUESTION, "--policy", policy.replace("1", "0.5"), *SAMPLED)
    assert plain["route"] == "fast"
    assert plain["confidence"] >= 0.5
    shown = generate("miniature", QUESTION, "--policy", policy.replace("1", "0.5"), *SAMPLED)
    assert "exit: confidence" in shown.stdout
    refused = generate("miniature", QUESTION, "--policy", policy.replace(";", "/"))
    assert refused.exit_code == 2
    assert "marker '/' is a piece of the closing tag" in " ".join(refused.stderr.split())


def test_a_schedule_is_taken_for_lambda(rows: Callable[..., Any]) -> None:
    schedule = {"kind": "piecewise", "points": [[0, 0.0], [3, 0.0], [3, 1.0]]}
    (row,) = rows(*DIAL, QUESTION, "--lambda", json.dumps(schedule), "--max-new-tokens", 50)
    assert (row["policy"], row["lambda"]) == (schedule, None)


def test_samples_follow_the_seed_alone(rows: Callable[..., Any]) -> None:
    asked = (*DIAL, QUESTION, *SAMPLED)
    first = rows(*asked, "-n", 3, "--lambda", "0,1")
    assert [(row["setting"], row["sample"]) for row in first] == [
        (setting, sample) for setting in ("λ=0", "λ=1") for sample in range(3)
    ]
    slow = [row["response"] for row in first[:3]]
    assert len(set(slow)) > 1
    assert slow == [row["response"] for row in rows(*asked, "-n", 3, "--lambda", 0)]
    assert slow != [row["response"] for row in rows(*asked, "-n", 3, "--lambda", 0, "--seed", 1)]


def test_a_published_setting_is_sampled(rows: Callable[..., Any]) -> None:
    def written(*options: object) -> list[str]:
        return [row["response"] for row in rows(*DIAL, QUESTION, "--lambda", "0,1", *options)]

    greedy = written("--temperature", 0)
    assert written(*SAMPLED, "--top-k", 1) == greedy
    assert written(*SAMPLED, "--min-p", 1) == greedy
    assert written(*SAMPLED, "--top-k", 20, "--seed", 3) != greedy
    for name in ("repetition", "presence", "frequency"):
        assert written("--temperature", 0, f"--{name}-penalty", 1.9) != greedy


def test_prompts_come_from_standard_input_and_files(
    rows: Callable[..., Any], piped: Callable[[str], None], tmp_path: Path
) -> None:
    short = ("--lambda", 1, "--temperature", 0)
    expected = [rows(*DIAL, question, *short)[0]["response"] for question in (QUESTION, "4+4+8?")]
    for arguments in ([], ["-"]):
        piped(f"{QUESTION}\n")
        assert [row["response"] for row in rows(*DIAL, *arguments, *short)] == expected[:1]
    text = tmp_path / "questions.txt"
    text.write_text(f"{QUESTION}\n\n4+4+8?\n")
    assert [row["response"] for row in rows(*DIAL, "--prompts", text, *short)] == expected
    forms: list[tuple[Any, Any]] = [
        ({"problem": QUESTION}, [{"role": "user", "content": QUESTION}]),
        ({"messages": [{"role": "user", "content": QUESTION}]},) * 2,  # type: ignore[list-item]
        ({"prompt": f"<bos>{QUESTION}"}, f"<bos>{QUESTION}"),
    ]
    for form, given in forms:
        file = tmp_path / "questions.jsonl"
        file.write_text(json.dumps(form) + "\n")
        (row,) = rows(*DIAL, "--prompts", file, *short)
        assert row["response"] == expected[0]
        assert row["prompt"] == given.get("messages", given) if isinstance(given, dict) else given


def test_what_a_person_sees(generate: Callable[..., Any]) -> None:
    result = generate(*DIAL, QUESTION, "--lambda", 0, "--policy", "adaptive 1", *SAMPLED)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == QUESTION
    assert lines[1].startswith("λ=0 ─")
    assert lines[2].startswith("<think> #1 9 + 3 = ")
    assert "</think> " in lines[2]
    tokens = count(lines[2])
    assert lines[3].startswith(f"{tokens} tokens ({tokens - 3} thinking + 3 answer) · ")
    assert lines[3].endswith(" tokens/s")
    assert lines[4].startswith("adaptive 1 ─")
    assert lines[6].startswith("slow: fast answer's confidence 0.")
    assert lines[6].endswith(" < 1")
    assert " rejected) · " in lines[7]
    assert "answers" in result.stderr


def test_answers_appear_as_their_batch_is_done(
    generate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "questions.txt"
    file.write_text(f"1+2+3?\n{QUESTION[:-1]}+1?\n4+5+6?\n")
    asked = (*DIAL, "--prompts", file, "--lambda", "0.5,1", "--batch-size", 2, *SAMPLED)
    whole = generate(*asked)
    answer, batches = LocalBackend._answer, []

    def break_at_the_third(self: LocalBackend, *given: Any) -> Any:
        batches.append(given)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return answer(self, *given)

    monkeypatch.setattr(LocalBackend, "_answer", break_at_the_third)
    broken = generate(*asked)
    assert broken.exit_code == 130
    told = [line for line in broken.stdout.splitlines() if "tokens/s" not in line]
    assert [line for line in told if line.endswith("?")] == [f"{QUESTION[:-1]}+1?", "1+2+3?"]
    assert (
        told == [line for line in whole.stdout.splitlines() if "tokens/s" not in line][: len(told)]
    )
    assert sum(line.startswith("λ=") for line in told) == 4


def test_a_pair_and_a_plain_model_answer_too(rows: Callable[..., Any]) -> None:
    pair = ("miniature", "--aligned", "miniature:aligned", *SAMPLED)
    default, extrapolated = (
        rows(*pair, QUESTION),
        rows(*pair, QUESTION, "--lambda=-0.5,2", "--lambda-range=-1,2"),
    )
    assert [row["setting"] for row in default + extrapolated] == ["λ=1", "λ=-0.5", "λ=2"]
    (aligned,) = rows("miniature:aligned", QUESTION, *SAMPLED)
    assert aligned["response"] == default[0]["response"]
    assert (aligned["setting"], aligned["lambda"]) == ("as it is", None)


@pytest.mark.parametrize(
    "asked",
    [
        ("--lambda=-0.5",),
        ("--lambda", '{"kind": "linear", "start": 1, "end": -1, "steps": 9}'),
        ("--policy", '{"policy": "adaptive", "slow_lambda": -0.1}'),
    ],
)
def test_a_pair_is_not_led_away_from_the_alignment_unasked(
    generate: Callable[..., Any], asked: tuple[str, ...]
) -> None:
    pair = ("miniature", "--aligned", "miniature:aligned", QUESTION)
    refused = generate(*pair, *asked)
    assert refused.exit_code == 2
    assert "leads away from the aligned model, which on a chat pair undoes" in refused.stderr
    assert "--lambda-range LEAST,LARGEST" in refused.stderr
    beyond = generate(*pair, *asked, "--lambda", "3", "--lambda-range=-2,2")
    assert "outside the range [-2, 2] of the pair miniature,miniature:aligned" in beyond.stderr


def test_the_range_is_the_adapters_until_it_is_widened(
    generate: Callable[..., Any], rows: Callable[..., Any]
) -> None:
    refused = generate(*DIAL, QUESTION, "--lambda", "0,1.5")
    assert refused.exit_code == 2
    assert "λ=1.5: outside the range [0, 1]" in refused.stderr
    (row,) = rows(*(*DIAL, QUESTION, "--lambda", 1.5, "--lambda-range=-1,2", "--max-new-tokens", 5))
    assert row["lambda"] == 1.5


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder("fast"), tmp_path / "adapter"))


def test_what_calibration_measured_stands_beside_the_setting(
    generate: Callable[..., Any], adapter: Path
) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text())
    measured = [("λ=0", 80.0), ("λ=0.5", 66.4)]
    share = Interval(0.4, 0.5, 0.6)
    config["calibration"] = Calibration(
        ((100.0, 0.0),),
        settings=tuple(
            MeasuredSetting(
                name, SettingMetrics(Interval(tokens, tokens, tokens), 1.0, 99.0, share)
            )
            for name, tokens in measured
        ),
    ).to_json()
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    asked = ("--lambda", "0,0.5,1", "--max-new-tokens", 3)
    result = generate("miniature", QUESTION, "--adapter", adapter, *asked)
    names = [line.strip(" ─") for line in result.stdout.splitlines() if line.startswith("λ=")]
    assert names == ["λ=0", "λ=0.5: −17 % tokens, measured", "λ=1"]
    assert "λ: 0 is the reference, 1 the aligned model or the adapter's" in result.stderr


def change_base(adapter: Path) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(config | {"base_fingerprint": "0" * 16}))


def cut(adapter: Path) -> None:
    weights = adapter / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change_base, "the adapter {} was made for"),
        (cut, "cannot be read"),
        (lambda adapter: (adapter / WEIGHTS_FILE).unlink(), "is missing"),
        (shutil.rmtree, "there is no adapter"),
    ],
)
def test_adapters_that_cannot_be_used_are_refused_before_weights_load(
    generate: Callable[..., Any],
    adapter: Path,
    spoil: Callable[[Path], None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(adapter)
    monkeypatch.setattr(
        "flexalign.generation.adapted.load_model", lambda *_, **__: pytest.fail("loaded")
    )
    result = generate("miniature", QUESTION, "--adapter", adapter)
    assert result.exit_code == 2
    assert said.format(adapter) in result.stderr
    assert result.stderr.count("error:") == 1
    assert result.stdout == ""


def test_any_base_takes_an_adapter_made_for_another(
    rows: Callable[..., Any], adapter: Path
) -> None:
    change_base(adapter)
    (row,) = rows(
        *("miniature", QUESTION, "--adapter", adapter, "--any-base"),
        *("--lambda", 1, "--temperature", 0),
    )
    assert (
        row["response"] == rows(*DIAL, QUESTION, "--lambda", 1, "--temperature", 0)[0]["response"]
    )


def test_a_truncated_base_is_refused(generate: Callable[..., Any], tmp_path: Path) -> None:
    base = Path(shutil.copytree(folder("reference"), tmp_path / "base"))
    (weights,) = base.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    for arguments in ([], ["--adapter", "miniature:fast"], ["--aligned", "miniature:aligned"]):
        result = generate(base, QUESTION, *arguments)
        assert result.exit_code == 2, result.stderr
        assert "cut off or damaged" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*DIAL, QUESTION, "--lambda", "nan"), "'nan' is not a finite number"),
        ((*DIAL, QUESTION, "--lambda", "0,,1"), "'' is not a finite number"),
        ((*DIAL, QUESTION, "--lambda", "0,0.0"), "given twice"),
        ((*DIAL, QUESTION, "--lambda", '{"kind": "liner"}'), "did you mean 'linear'"),
        ((*DIAL, QUESTION, "--lambda-range", "0,1,2"), "--lambda-range takes LEAST,LARGEST"),
        ((*DIAL, QUESTION, "--policy", "adaptive x"), "'x' is not a number"),
        ((*DIAL, QUESTION, "--policy", "adaptive 2"), "must be a number in [0, 1]"),
        (
            (*DIAL, QUESTION, "--policy", '{"policy": "adaptive", "fast_lambda": 2}'),
            "outside the range [0, 1]",
        ),
        (
            (*DIAL, QUESTION, "--lambda", '{"kind": "linear", "start": 0, "end": 3, "steps": 9}'),
            "outside the range [0, 1]",
        ),
        (("miniature", QUESTION, "--lambda", "0.5"), "λ=0.5 needs a dial"),
        (("miniature", QUESTION, "--gate", "0.1"), "a gate needs a dial"),
        ((*DIAL, QUESTION, "--aligned", "miniature:aligned"), "not both"),
        (("miniature", QUESTION, "--lambda-range=0,2"), "--lambda-range needs a dial"),
        (("miniature", QUESTION, "--any-base"), "name --adapter"),
        ((*DIAL, QUESTION, "--prompts", "questions.txt"), "PROMPT or --prompts, not both"),
        ((*DIAL, "--prompts", "missing.txt"), "missing.txt: no such file"),
        ((*DIAL, " "), "the prompt is empty"),
        ((*DIAL, QUESTION, "--temperature", "0", "-n", "2"), "all equal at temperature 0"),
        ((*DIAL, QUESTION, "--temperature", "-1"), "temperature must be"),
        (("nowhere", QUESTION), "there is no model 'nowhere'"),
        (("miniature", QUESTION, "--dtype", "int8"), "--dtype must be one of auto, float32"),
    ],
)
def test_wrong_input_is_one_sentence(
    generate: Callable[..., Any], arguments: tuple[object, ...], said: str
) -> None:
    result = generate(*arguments)
    assert result.exit_code == 2, result.stderr
    assert said in result.stderr
    assert result.stderr.count("error:") == 1
    assert result.stdout == ""


def test_a_terminal_is_told_where_prompts_come_from(
    generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    for arguments in ((), ("-",)):
        result = generate(*DIAL, *arguments)
        assert result.exit_code == 2
        assert "there is no prompt" in result.stderr


def test_text_that_is_not_utf_8_is_refused(generate: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_bytes(b"\xff\xfe1+2")
    assert "not UTF-8" in generate(*DIAL, "--prompts", file).stderr
    file.write_text("\n \n")
    assert "holds no prompt" in generate(*DIAL, "--prompts", file).stderr


@pytest.mark.parametrize(
    ("option", "value", "parses"),
    [
        ("--lambda", "0.375", 0),  # a number becomes a dial without a form to be parsed
        ("--lambda", '{"kind": "linear", "start": 0.375, "end": 1, "steps": 4}', 1),
        ("--policy", '{"policy": "fixed", "lambda": 0.375}', 1),
    ],
)
def test_a_lambda_is_parsed_once_and_its_range_checked_once(
    rows: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    parses: int,
) -> None:
    counts = count_lambda(monkeypatch, 0.375)
    (row,) = rows(*DIAL, QUESTION, option, value, "--max-new-tokens", 6, *SAMPLED)
    assert row["tokens"] > 1
    assert counts == Counter(dials=1, numbers=1, ranges=1, parses=parses)
