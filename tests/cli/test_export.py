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


@pytest.fixture
def student(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_a_model_becomes_a_gguf_file_with_a_modelfile_beside_it(
    run_cli: Any, student: Path, tmp_path: Path
):
    pytest.importorskip("gguf", reason="gguf is not installed (flexalign[gguf])")
    output, beside = tmp_path / "out" / "student.gguf", tmp_path / "out" / "student.Modelfile"
    command = ("export", "gguf", student, output, "--outtype", "bf16")
    dry = run_cli(*command, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert "nothing is written" in dry.stderr
    assert not output.parent.exists()

    result = run_cli(*command, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    size = found.pop("bytes")
    assert found == {
        "format": "gguf",
        "output": str(output),
        "modelfile": str(beside),
        "outtype": "bf16",
        "stops": ["<|im_end|>"],
        "thinking": ["<think>", "</think>"],
        "dry_run": False,
    }
    assert sorted(output.parent.iterdir()) == [beside, output]
    assert size < output.stat().st_size

    again = run_cli(*command)
    assert again.exit_code == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("miniature:aligned", "WordLevel"),
        ("miniature:dial", "bake one λ of it"),
        ("miniature:fast", "bake one λ of it"),
        ("no/such/folder", "no/such/folder"),
    ],
)
def test_what_cannot_be_gguf_is_one_sentence(run_cli: Any, tmp_path: Path, model: str, says: str):
    pytest.importorskip("gguf", reason="gguf is not installed (flexalign[gguf])")
    result = run_cli("export", "gguf", model, tmp_path / "out.gguf")
    assert result.exit_code == 2
    assert result.stderr.count("error:") == 1
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []
