"""Effort of one model under two prompts: its calibration, where it is stored, and who uses it."""

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexalign.calibration import calibrate
from flexalign.calibration.effort import Calibration, store_calibration
from flexalign.data.prompting import PromptSettings
from flexalign.errors import ConfigError
from flexalign.evaluation.tasks import load_task
from flexalign.generation.two_prompt_config import TwoPromptConfig
from flexalign.lambdas import Adaptive
from flexalign.miniature.world import SYSTEM
from flexalign.models.loading import fingerprint, load_tokenizer
from flexalign.models.prompted import PromptPair
from flexalign.models.sources import resolve
from flexalign.systems import LocalBackend, SystemOptions, parse_system

MODEL = "miniature:hybrid"
TOLD = ("--aligned-prompt", f"system={SYSTEM}")
PROMPTS = PromptPair(aligned=PromptSettings(system=SYSTEM))
QUESTION = "9+3+6?"
GREEDY = ("--temperature", 0, "--max-new-tokens", 20)
LAMBDAS = [[0.0, 1.0], [40.0, 0.8], [100.0, 0.0], [125.0, -0.5]]
HALF = 0.8 - 0.8 * (50 - 40) / (100 - 40)
"""λ of effort 50, on the line between the points around it."""


def stored(folder: Path, model: str, prompts: PromptPair, **changes: Any) -> Path:
    """A calibration's folder, whose points are given instead of measured."""
    given = {"version": 1, "effort": {"lambdas": LAMBDAS}, "lambda_range": [-0.5, 1.0]} | changes
    settings = TwoPromptConfig.of(resolve(model), load_tokenizer(model), prompts)
    folder.mkdir()
    store_calibration(folder, Calibration.from_json(given), settings)
    return folder


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """A calibration of the miniature's hybrid."""
    return stored(tmp_path / "effort", MODEL, PROMPTS)


def test_generate_turns_to_the_calibrated_lambda(
    run_cli: Callable[..., Any], calibrated: Path
) -> None:
    asked = ("generate", MODEL, QUESTION, *TOLD, *GREEDY, "--json")
    result = run_cli(*asked, "--calibration", calibrated, "--effort", "0,50,100,125")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["lambda"] for row in rows] == pytest.approx([1, HALF, 0, -0.5])
    given = ",".join(str(row["lambda"]) for row in rows)
    same = json.loads(run_cli(*asked, "--lambda", given, "--lambda-range", "-1,1").stdout)
    assert [row["response"] for row in rows] == [row["response"] for row in same]


def test_chat_and_evaluate_take_an_effort(
    run_cli: Callable[..., Any], calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = (*TOLD, "--calibration", calibrated)
    monkeypatch.setattr("sys.stdin", io.StringIO("/effort 50\n/effort 500\n/quit\n"))
    result = run_cli("chat", MODEL, *use, "--effort", 100)
    assert result.exit_code == 0, result.stderr
    assert f"effort 50: λ={HALF:g}" in result.stderr
    assert "an effort of this dial is a number from 0 (fastest) to 125" in result.stderr
    result = run_cli(
        *("evaluate", f"prompts:{MODEL}", f"model:{MODEL}", *use, "--task", "miniature"),
        *("--effort", "0,50", "--limit", 2, "--dry-run", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    prompted, _ = json.loads(result.stdout)["configuration"]["systems"]
    found = [(one["effort"], one["lambda"]) for one in prompted["settings"]]
    assert found == [(0, 1.0), (50, pytest.approx(HALF))]


def test_an_adaptive_calibration_turns_the_threshold(
    run_cli: Callable[..., Any], tmp_path: Path, hybrid_folder: Path
) -> None:
    """The aligned prompt closes the thinking, so that its answer may be taken, or not."""
    prompts = PromptPair(aligned=PromptSettings({"enable_thinking": False}))
    points = {"thresholds": [[0.0, 0.0], [100.0, 1.0]], "lambdas": [[100.0, 0.0]]}
    more = {"effort": points, "measure": "min_token_probability"}
    folder = stored(tmp_path / "effort", str(hybrid_folder), prompts, **more)
    result = run_cli(
        *("evaluate", f"prompts:{hybrid_folder}", "--aligned-prompt", "enable_thinking=false"),
        *("--calibration", folder, "--task", "miniature", "--limit", 1, "--dry-run", "--json"),
        *("--effort", "0,25,100"),
    )
    assert result.exit_code == 0, result.stderr
    (system,) = json.loads(result.stdout)["configuration"]["systems"]
    policies = [one["policy"] for one in system["settings"]]
    assert [policy and policy["threshold"] for policy in policies] == [0, 0.25, None]
    assert {policy["measure"] for policy in policies if policy} == {"min_token_probability"}


def test_a_policy_without_a_threshold_takes_the_calibrated_one(tmp_path: Path) -> None:
    folder = stored(tmp_path / "effort", MODEL, PROMPTS, threshold=0.75)
    for calibration, threshold in ((folder, 0.75), (None, 0.5)):
        options = SystemOptions(prompts=PROMPTS, calibration=calibration)
        model = LocalBackend(parse_system(f"prompts:{MODEL}"), options=options).load()
        assert model.threshold(Adaptive()) == threshold


def test_arguments_of_the_template_that_both_sides_have_are_part_of_the_prompts(
    tmp_path: Path, hybrid_folder: Path
) -> None:
    told, off = PromptSettings(system="one two"), {"enable_thinking": False}
    both = PromptPair(PromptSettings(off), PromptSettings(off, "one two"))
    folder = stored(tmp_path / "effort", str(hybrid_folder), both)
    system = parse_system(f"prompts:{hybrid_folder}")
    common = SystemOptions(
        prompts=PromptPair(aligned=told), template={"enable_thinking": False}, calibration=folder
    )
    measured = TwoPromptConfig.load(folder).calibration
    for options in (SystemOptions(prompts=both, calibration=folder), common):
        assert LocalBackend(system, options=options).calibration == measured
    with pytest.raises(ConfigError, match="reference: enable_thinking=False there, none here"):
        LocalBackend(
            system, options=SystemOptions(prompts=PromptPair(aligned=told), calibration=folder)
        )

    # Another chat template makes other prompts of the same settings.
    tokenizer = load_tokenizer(hybrid_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\n{%", "<think>{%")
    tokenizer.save_pretrained(hybrid_folder)
    with pytest.raises(ConfigError, match="was measured with another chat template"):
        LocalBackend(system, options=common)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("generate", MODEL, QUESTION, "--aligned-prompt", "system=again"),
            "under other prompts (aligned: system='check ;' there, system='again' here); give the",
        ),
        (
            ("chat", MODEL, "--reference-prompt", "system=again", *TOLD),
            "under other prompts (reference: none there, system='again' here)",
        ),
        (("serve", "miniature:reference", *TOLD), f"is of {MODEL} (fingerprint "),
        (
            ("evaluate", "prompts:miniature:aligned", *TOLD, "--task", "miniature", "--dry-run"),
            "other weights; give its own model, or run flexalign calibrate for what you ask",
        ),
        (("generate", MODEL, QUESTION), "--calibration is that of one model under two prompts"),
        (("serve", MODEL), "--calibration is that of one model under two prompts"),
        (("serve", MODEL, "--engine", "vllm"), "which vLLM does not serve"),
        (("serve", MODEL, *TOLD, "--engine", "vllm"), "served by --engine local alone"),
        (
            ("evaluate", f"model:{MODEL}", "--task", "miniature", "--dry-run"),
            "--calibration is that of one model under two prompts",
        ),
        (
            ("generate", MODEL, QUESTION, *TOLD, "--lambda", 1.5),
            "outside the range [-0.5, 1] of miniature:hybrid under two prompts",
        ),
    ],
)
def test_a_calibration_is_of_its_model_and_its_prompts(
    run_cli: Callable[..., Any], calibrated: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run_cli(*arguments, "--calibration", calibrated)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "command",
    [
        ("generate", MODEL, QUESTION),
        ("chat", MODEL),
        ("evaluate", f"prompts:{MODEL}", "--task", "miniature", "--dry-run"),
    ],
    ids=lambda command: command[0],
)
def test_a_calibration_of_other_prompts_is_refused_before_its_effort_is_said(
    run_cli: Callable[..., Any],
    calibrated: Path,
    command: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    asked = (*command, "--calibration", calibrated, "--effort", 50)
    result = run_cli(*asked, "--aligned-prompt", "system=check")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "effort 50" not in result.stderr
    more = GREEDY if command[0] != "evaluate" else ()
    result = run_cli(*asked, *TOLD, *more)
    assert result.exit_code == 0, result.stderr
    assert f"effort 50: λ={HALF:g}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("generate", MODEL, QUESTION, *TOLD, "--effort", 50),
            "run flexalign calibrate MODEL --aligned-prompt … --task TASK --save-to FOLDER",
        ),
        (
            ("evaluate", f"prompts:{MODEL}", *TOLD, "--effort", 50, "--task", "miniature"),
            "run flexalign calibrate MODEL --aligned-prompt … --task TASK --save-to FOLDER",
        ),
        (
            ("generate", MODEL, QUESTION, *TOLD, "--effort", 50, "--calibration", "."),
            "holds no calibration of two prompts (two_prompts.json is missing)",
        ),
        (("calibrate", MODEL, *TOLD, "--task", "miniature"), "--save-to is missing"),
        (("calibrate", MODEL, *TOLD, "--task", "miniature", "--save-to", "."), "is there already"),
        (
            ("calibrate", MODEL, "--task", "miniature", "--save-to", "new"),
            "name its --adapter or an --aligned-prompt",
        ),
        (
            ("calibrate", f"prompts:{MODEL}", *TOLD, "--task", "miniature"),
            f"flexalign calibrate {MODEL} --aligned-prompt … --save-to FOLDER",
        ),
        (
            ("calibrate", MODEL, *TOLD, "--adapter", "miniature:fast", "--task", "miniature"),
            "leave them out, or --adapter",
        ),
        (
            ("calibrate", MODEL, *TOLD, "--task", "miniature", "--push", "acme/effort"),
            "--push uploads an adapter",
        ),
    ],
)
def test_what_is_missing_is_said(
    run_cli: Callable[..., Any], arguments: tuple[str, ...], message: str
) -> None:
    result = run_cli(*arguments, *(("-o", "out") if "evaluate" in arguments else ()))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {"aligned": {}}}, "prompts must have reference and aligned"),
        ({"prompts": {"reference": {}, "aligned": {"user": "x"}}}, "may have system and template"),
        ({"calibration": None}, "has no calibration"),
        ({"format_version": 2}, "format_version 2"),
    ],
)
def test_a_damaged_file_is_refused(
    run_cli: Callable[..., Any], calibrated: Path, change: dict[str, Any], message: str
) -> None:
    file = calibrated / "two_prompts.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    result = run_cli("generate", MODEL, QUESTION, *TOLD, "--calibration", calibrated)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_the_cost_is_told_and_prompts_that_save_nothing_get_no_calibration(
    run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    asked = ("calibrate", MODEL, *TOLD, "--task", "miniature", "--save-to", tmp_path / "new")
    told = run_cli(*asked, "--limit", 10, "--dry-run", "--json")
    assert told.exit_code == 0, told.stderr
    ways, lambdas = json.loads(told.stdout)["sweeps"]
    assert ways == {"settings": ["λ=0", "adaptive 0"], "samples": 20}
    assert lambdas["samples"] == 90
    # All answers are cut off at one length, so that nothing is saved.
    result = run_cli(*asked, "--limit", 3, "--max-new-tokens", 6)
    assert result.exit_code == 2
    assert "no setting of this dial saves tokens beyond chance" in result.stderr
    assert "give prompts for shorter answers" in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_what_is_calibrated_can_be_asked_for(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    found = calibrate(
        MODEL,
        None,
        load_task("miniature", limit=40),
        prompts=PROMPTS,
        save_to=tmp_path / "effort",
        dial="lambda",
        batch_size=400,
    )
    settings = TwoPromptConfig.load(tmp_path / "effort")
    assert settings.calibration == json.loads(json.dumps(found.to_json()))
    assert settings.prompts == {"reference": {}, "aligned": {"system": SYSTEM}}
    assert settings.base_fingerprint == fingerprint(MODEL) == found.parts[0]["fingerprint"]

    # λ of effort 50, from the measured tokens alone: the means, made to fall with λ (neighbours
    # that do not are one block with their mean), halfway between the first and the last.
    means = {one.setting: one.metrics.tokens.mean for one in found.settings}
    lams = [step / 8 for step in range(9)]
    blocks = [[means[f"λ={lam:g}"]] for lam in lams]
    while rising := [at for at, (a, b) in enumerate(pairwise(blocks)) if np.mean(a) < np.mean(b)]:
        blocks[rising[0] : rising[0] + 2] = [blocks[rising[0]] + blocks[rising[0] + 1]]
    falling = [float(np.mean(block)) for block in blocks for _ in block]
    half = (falling[0] + falling[-1]) / 2
    lower = next(i for i, tokens in enumerate(falling) if tokens <= half)
    share = (falling[lower - 1] - half) / (falling[lower - 1] - falling[lower])
    by_hand = lams[lower - 1] + share / 8
    assert not found.holes

    result = run_cli(
        *("evaluate", f"prompts:{MODEL}", *TOLD, "--calibration", tmp_path / "effort"),
        *("--task", "miniature", "--limit", 2, "-n", 1, "--effort", 50, "-o", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert row["effort"] == 50
    assert row["lambda"] == pytest.approx(by_hand, abs=1e-6)
