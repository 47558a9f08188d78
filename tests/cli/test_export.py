"""``flexalign export``: the adapters of chosen strengths, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from flexalign.lora_dial import LoRADialConfig


@pytest.fixture(scope="module")
def dial(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("dial") / "dial"
    peft = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    peft.save_pretrained(folder)
    LoRADialConfig("base", "", lambda_range=(0.0, 3.0)).save(folder)
    return folder


@pytest.mark.parametrize("named", [(), ("lora",)])
def test_it_writes_a_folder_for_each_lambda(
    run_cli: Any, dial: Path, tmp_path: Path, named: tuple[str, ...]
):
    output = tmp_path / "out"
    result = run_cli("export", *named, dial, "--lambda", "0.5,2", "--output", output, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {
        "format": "lora",
        "output": str(output),
        "adapters": [
            {"lambda": 0.5, "path": str(output / "lambda=0.5")},
            {"lambda": 2.0, "path": str(output / "lambda=2")},
        ],
        "dry_run": False,
    }
    for name in ("lambda=0.5", "lambda=2"):
        assert (output / name / "adapter_model.safetensors").is_file()


def test_options_may_come_first_and_a_dry_run_writes_nothing(
    run_cli: Any, dial: Path, tmp_path: Path
):
    output = tmp_path / "out"
    result = run_cli("export", "--lambda", "1", "--output", output, "--dry-run", dial)
    assert result.exit_code == 0, result.stderr
    assert "nothing is written" in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--lambda", "4"), "outside the range [0, 3]"),
        (("--lambda", "x"), "finite number"),
        (("--lambda", "1,1"), "twice"),
        (("--lambda", "1", "--lambda-range", "2,1"), "--lambda-range"),
    ],
)
def test_bad_input_is_one_sentence(
    run_cli: Any, dial: Path, tmp_path: Path, options: tuple[str, ...], says: str
):
    result = run_cli("export", dial, *options, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_dial_and_an_output_that_is_there(
    run_cli: Any, dial: Path, tmp_path: Path
):
    for folder, output, says in (
        (tmp_path, tmp_path / "out", "holds no"),
        ("miniature:fast", tmp_path / "out", "InRa adapter"),
        (dial, dial, "is there already"),
    ):
        result = run_cli("export", folder, "--lambda", "1", "--output", output)
        assert result.exit_code == 2
        assert says in result.stderr
