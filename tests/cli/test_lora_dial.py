"""A LoRA dial in every command that takes an adapter."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexalign.calibration.effort import (
    Calibration,
    copy_adapter,
    is_packaged,
    store_calibration,
)
from flexalign.generation.responses import generate_responses
from flexalign.lora_dial import LoRADial
from flexalign.systems.dials import read_dial
from lora_folders import BASE, write_dial

QUESTION = "9+3+6?"
SHORT = ("--max-new-tokens", 40, "--temperature", 1, "--top-p", 1)
CALIBRATION = {
    "version": 1,
    "measure": "answer_probability",
    "lambda_range": [0.0, 5.0],
    "holes": [],
    "effort": {"thresholds": [], "lambdas": [[0.0, 4.0], [100.0, 0.0]]},
    "dial": "lambda",
}


@pytest.fixture(scope="module")
def dial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dial(tmp_path_factory.mktemp("lora") / "dial")


@pytest.fixture
def plain(dial: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(dial, tmp_path / "plain")
    (folder / "lora_dial.json").unlink()
    return folder


@pytest.fixture
def calibrated(dial: Path, tmp_path: Path) -> Path:
    copy_adapter(dial, tmp_path / "calibrated")
    store_calibration(tmp_path / "calibrated", Calibration.from_json(CALIBRATION))
    return tmp_path / "calibrated"


@pytest.fixture(scope="module")
def alone(dial: Path) -> Callable[..., str]:
    """What the library writes for the question."""
    model = LoRADial.from_pretrained(BASE, dial)

    def write(lam: Any, seed: int = 0, temperature: float = 0.0, tokens: int = 40) -> str:
        [response] = generate_responses(
            model,
            model.tokenizer,
            [[{"role": "user", "content": QUESTION}]],
            max_new_tokens=tokens,
            temperature=temperature,
            lam=[lam],
            seeds=[seed],
        )
        return response.text

    return write


def test_generate(run_cli: Any, dial: Path, alone: Callable[..., str]) -> None:
    asked = ("generate", BASE, QUESTION, "--adapter", dial, "--temperature", 0)
    result = run_cli(*asked, "--max-new-tokens", 40, "--lambda", "0,1,4.5", "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["response"] for row in rows] == [alone(lam) for lam in (0, 1, 4.5)]
    assert len({row["response"] for row in rows}) > 1 or rows[0]["truncated"]
    policy = '{"policy": "adaptive", "threshold": 1, "fast_lambda": 4, "slow_lambda": 0.5}'
    result = run_cli(*asked, "--max-new-tokens", 40, "--policy", policy, "--json")
    [row] = json.loads(result.stdout)
    assert (row["route"], row["response"]) == ("slow", alone(0.5))


def test_chat(run_cli: Any, dial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (QUESTION, "/lambda 4", QUESTION, "/lambda 9", "/policy route 0", QUESTION)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    result = run_cli("chat", BASE, "--adapter", dial, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 3
    assert "outside the range [0, 5]" in result.stderr


def test_evaluate_and_tune(run_cli: Any, dial: Path, tmp_path: Path) -> None:
    system, output = f"mine=dial:{BASE},{dial}", tmp_path / "sweep"
    asked = (system, "--task", BASE, "--limit", 3, "--samples", 2, "--lambda", "0,2.5", *SHORT)
    result = run_cli("evaluate", *asked, "-o", output)
    assert result.exit_code == 0, result.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert [row["lambda"] for row in summary["rows"]] == [0.0, 2.5]
    assert {row["n_samples"] for row in summary["rows"]} == {6}
    result = run_cli("evaluate", system, "--task", BASE, "--lambda", "0,7", "-o", tmp_path / "no")
    assert (result.exit_code, "outside the range [0, 5]" in result.stderr) == (2, True)


def test_tune(run_cli: Any, dial: Path, tmp_path: Path) -> None:
    asked = ("tune", f"dial:{BASE},{dial}", "--task", BASE, "--limit", 20, "--lambda", "2.5")
    result = run_cli(*asked, *SHORT, "-o", tmp_path / "tuned", "--margin", "0.9", "--json")
    assert result.exit_code == 0, result.stderr
    tuned = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    assert tuned == json.loads(result.stdout)
    rows = (tmp_path / "tuned" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(row)["lambda"] for row in rows} == {0.0, 2.5}


def test_calibrate(run_cli: Any, dial: Path, plain: Path, tmp_path: Path) -> None:
    asked = ("calibrate", BASE, "--adapter", dial, "--task", BASE, "--limit", 3, *SHORT)
    result = run_cli(
        *asked, "--dial", "lambda", "--save-to", tmp_path / "new", "--dry-run", "--json"
    )
    assert result.exit_code == 0, result.stderr
    [lambdas] = json.loads(result.stdout)["sweeps"]
    assert {"λ=0", "λ=5"} <= set(lambdas["settings"])

    # Nothing lies between the two settings of a plain LoRA, and the adaptive dial needs no more.
    asked = ("calibrate", BASE, "--adapter", plain, "--task", BASE, "--limit", 3, *SHORT)
    result = run_cli(*asked, "--dial", "lambda")
    assert (result.exit_code, "plain LoRA" in result.stderr) == (2, True), result.stderr
    result = run_cli(*asked, "--dial", "adaptive", "--dry-run", "--json")
    assert json.loads(result.stdout)["sweeps"][0]["settings"] == ["λ=0", "adaptive 0"]


def test_a_calibration_is_stored_beside_the_lora(
    run_cli: Any, dial: Path, calibrated: Path, alone: Callable[..., str]
) -> None:
    names = {"README.md", "adapter_model.safetensors", "adapter_config.json", "lora_dial.json"}
    assert {path.name for path in calibrated.iterdir()} == names
    stored, before = read_dial(calibrated), read_dial(dial)
    assert stored.calibration == Calibration.from_json(CALIBRATION).to_json()
    assert (stored.lambda_range, stored.base) == (before.lambda_range, before.base)
    assert not is_packaged(calibrated)
    asked = ("generate", BASE, QUESTION, "--adapter", calibrated, "--temperature", 0)
    result = run_cli(*asked, "--max-new-tokens", 40, "--effort", "50", "--json")
    assert result.exit_code == 0, result.stderr
    [row] = json.loads(result.stdout)
    assert (row["lambda"], row["response"]) == (2.0, alone(2.0))


def test_a_calibration_of_a_plain_lora_keeps_its_two_settings(plain: Path) -> None:
    found = Calibration.from_json(CALIBRATION | {"lambda_range": [0.0, 1.0]})
    stored = store_calibration(plain, found)
    assert read_dial(plain) == stored
    assert stored.lambda_range == (0.0, 1.0)


def test_the_written_file_is_named(
    run_cli: Any, dial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flexalign.cli.calibrate._run", lambda *_: Calibration.from_json(CALIBRATION)
    )
    save = ("--save-to", tmp_path / "new")
    result = run_cli("calibrate", BASE, "--adapter", dial, "--task", BASE, *save)
    assert result.exit_code == 0, result.stderr
    assert f"Written to {tmp_path / 'new'}/lora_dial.json" in result.stderr
    assert read_dial(tmp_path / "new").calibration == Calibration.from_json(CALIBRATION).to_json()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gate", "0.01"), "--gate: a LoRA dial takes no gate"),
        (("--lambda", "6"), "λ=6: outside the range [0, 5]"),
        (("--effort", "50"), "calibrat"),
        (("--aligned", "miniature:aligned"), "not both"),
    ],
)
def test_what_is_refused(run_cli: Any, dial: Path, options: Any, message: str) -> None:
    result = run_cli("generate", BASE, QUESTION, "--adapter", dial, *options)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_plain_lora(run_cli: Any, plain: Path, alone: Callable[..., str]) -> None:
    asked = ("generate", BASE, QUESTION, "--adapter", plain, "--temperature", 0)
    asked = (*asked, "--max-new-tokens", 40)
    result = run_cli(*asked, "--lambda", "0,1", "--json")
    assert [row["response"] for row in json.loads(result.stdout)] == [alone(0), alone(1)]
    result = run_cli(*asked, "--lambda", "0.5")
    assert (result.exit_code, "flexalign realign --lambda 0:5" in result.stderr) == (2, True)
    result = run_cli(*asked, "--lambda", "0.5", "--lambda-range", "0,1", "--json")
    assert json.loads(result.stdout)[0]["response"] == alone(0.5)


def test_another_base_and_damage_are_refused(run_cli: Any, plain: Path, dial: Path) -> None:
    result = run_cli("generate", "miniature:aligned", QUESTION, "--adapter", dial, *SHORT)
    assert (result.exit_code, "--any-base" in result.stderr) == (2, True), result.stderr
    (plain / "adapter_model.safetensors").write_bytes(b"short")
    result = run_cli("generate", BASE, QUESTION, "--adapter", plain, *SHORT)
    assert (result.exit_code, "truncated or corrupt" in result.stderr) == (2, True), result.stderr
