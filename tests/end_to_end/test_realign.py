"""``flexalign realign`` in this process, on models of two layers: everything but real faults."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from flexalign.training.checkpoints import fault_of, newest_complete
from flexalign.training.trainer import TrRaTrainer


@pytest.fixture
def tree(tmp_path: Path, tiny_pair: Any) -> dict[str, Any]:
    traces = tmp_path / "traces.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}, again {2 * n}"} for n in range(12)]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "reference": str(tiny_pair.reference),
        "aligned": str(tiny_pair.aligned),
        "data": str(traces),
        "output": str(tmp_path / "out"),
        "lambda": 2.0,
        "watch": {"prompts": str(questions), "every_steps": 2, "max_new_tokens": 4},
        "training": {
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_length": 64,
            "logging_steps": 1,
            "activation_checkpointing": False,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        },
    }


@pytest.fixture
def realign(tmp_path: Path, run_cli: Callable[..., Any]) -> Callable[..., Any]:
    def run(tree: dict[str, Any], *options: object) -> Any:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return run_cli("realign", path, *options)

    return run


def _weights(folder: str | Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: value.clone() for name, value in model.state_dict().items()}


def _equal(first: str | Path, second: str | Path) -> bool:
    one, two = _weights(first), _weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Act at the beginning of a training step, counted over this process."""
    original, done = TrRaTrainer.training_step, []

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) == step:
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TrRaTrainer, "training_step", training_step)


def test_a_run_leaves_a_model_that_loads_and_explains_itself(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    result = realign(tree, "--json")
    assert result.exit_code == 0, result.stderr
    outcome = json.loads(result.stdout)
    output = Path(tree["output"])
    assert outcome["output"] == str(output)
    assert outcome["steps"] == 4
    assert [row["step"] for row in outcome["curve"]] == [0, 2, 4]
    assert outcome["curve"][0]["graded"] == 3
    assert not _equal(output, tree["reference"])
    assert AutoTokenizer.from_pretrained(output).eos_token == "<|im_end|>"
    assert fault_of(output) is None
    assert not list(output.glob("*.bin"))
    assert not (output / "optimizer.pt").exists()
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["recipe"]["lambda"] == 2.0
    assert manifest["tokens_seen"] == outcome["tokens_seen"] > 0
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "flexalign realign" in card
    assert manifest["data"] in card
    assert "the realigned model:" in result.stderr
    assert "step 0:" in result.stderr


def test_a_finished_run_is_not_run_again(
    realign: Callable[..., Any], tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = realign(tree, "--json")
    monkeypatch.setattr(TrRaTrainer, "train", None)
    again = realign(tree, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert "finished" in again.stderr


def test_lambda_zero_stays_the_reference_and_two_teachers_differ(
    realign: Callable[..., Any], tree: dict[str, Any], tmp_path: Path
) -> None:
    del tree["watch"]
    tree["output"] = str(tmp_path / "zero")
    assert realign(tree, "--lambda", "0", "--set", "training.weight_decay=0.0").exit_code == 0
    zero, reference = _weights(tree["output"]), _weights(tree["reference"])
    tree["output"] = str(tmp_path / "two")
    assert realign(tree).exit_code == 0
    two = _weights(tree["output"])

    def moved(weights: dict[str, torch.Tensor]) -> float:
        return sum(float((weights[name] - reference[name]).norm()) for name in reference)

    assert moved(zero) < 0.2 * moved(two)


@pytest.mark.parametrize("packing", [False, True])
def test_ctrl_c_saves_and_the_same_command_goes_on_bit_for_bit(
    realign: Callable[..., Any],
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: bool,
) -> None:
    tree["lambda"] = {"kind": "linear", "start": 0, "end": 2, "steps": 4}
    tree["training"]["packing"] = packing
    whole = tree | {"output": str(tmp_path / "whole")}
    assert realign(whole).exit_code == 0
    with monkeypatch.context() as patch:
        _at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        stopped = realign(tree)
    assert stopped.exit_code == 130
    assert "checkpoint-3" in stopped.stderr
    assert "same command" in stopped.stderr
    resumed = realign(tree)
    assert resumed.exit_code == 0, resumed.stderr
    assert "going on from" in resumed.stderr
    assert _equal(tree["output"], whole["output"])
    curves = [(Path(run["output"]) / "curve.jsonl").read_text() for run in (tree, whole)]
    assert curves[0] == curves[1]
    manifests = [
        json.loads((Path(run["output"]) / "manifest.json").read_text()) for run in (tree, whole)
    ]
    assert manifests[0]["tokens_seen"] == manifests[1]["tokens_seen"]


def test_a_lora_student_is_an_adapter_and_merged_a_plain_model(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    del tree["watch"]
    tree["lora"] = {"r": 4, "lora_dropout": 0.1}
    result = realign(tree, "--merge")
    assert result.exit_code == 0, result.stderr
    output = Path(tree["output"])
    assert (output / "adapter_model.safetensors").exists()
    assert not (output / "model.safetensors").exists()
    ids = torch.arange(10, 20)[None]
    base = AutoModelForCausalLM.from_pretrained(tree["reference"])
    adapted = PeftModel.from_pretrained(base, output)(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(output)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")(ids).logits
    torch.testing.assert_close(plain, adapted)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    reference = AutoModelForCausalLM.from_pretrained(tree["reference"])(ids).logits
    assert not torch.allclose(adapted, reference, atol=1e-3)


@pytest.fixture
def shared_umask() -> Iterator[None]:
    """A umask that gives a group what its owner has."""
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.mark.usefixtures("shared_umask")
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_student_is_the_base_to_other_tools_and_other_people(
    realign: Callable[..., Any],
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: dict[str, Any] | None,
) -> None:
    base = shutil.copytree(tree["reference"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"pad_token_id": None, "use_cache": True}
    (base / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    del tree["watch"]
    result = realign(tree | {"reference": "base", "lora": lora, "merge": lora is not None})
    assert result.exit_code == 0, result.stderr

    # What trains sets use_cache and the special tokens; they are not what was learnt.
    output = Path(tree["output"])
    model = output if lora is None else output / "merged"
    saved = json.loads((model / "config.json").read_text())
    expected, found = (
        {key: value for key, value in one.items() if value is not None} for one in (config, saved)
    )
    assert found == expected | {"transformers_version": found["transformers_version"]}

    modes = {path: oct(path.stat().st_mode & 0o777) for path in output.rglob("*") if path.is_file()}
    assert any(path.suffix == ".safetensors" for path in modes)
    assert {path: mode for path, mode in modes.items() if mode != oct(0o664)} == {}

    if lora is not None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        named = json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(named).is_absolute()
        assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == 320


def test_rounds_are_whole_models_and_each_learns_from_the_last(
    realign: Callable[..., Any],
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del tree["watch"]
    tree |= {"rounds": 2, "lambda": 1.5}
    with monkeypatch.context() as patch:
        _at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = realign(tree)
    assert stopped.exit_code == 130
    output = Path(tree["output"])
    assert fault_of(output / "round-1") is None
    assert newest_complete(output).path == output / "checkpoint-2"
    resumed = realign(tree, "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["effective_lambda"] == 2.25

    first = tree | {"rounds": 1, "output": str(tmp_path / "first")}
    assert realign(first).exit_code == 0
    assert _equal(first["output"], output / "round-1")
    second = tree | {"rounds": 1, "output": str(tmp_path / "second"), "aligned": first["output"]}
    assert realign(second).exit_code == 0
    assert _equal(second["output"], output)


def test_rounds_of_a_lora_are_adapters_on_the_one_reference(
    realign: Callable[..., Any], tree: dict[str, Any]
) -> None:
    del tree["watch"]
    tree |= {"rounds": 2, "lora": {"r": 4}}
    tree["training"]["max_steps"] = 2
    result = realign(tree)
    assert result.exit_code == 0, result.stderr
    output = Path(tree["output"])
    ids = torch.arange(10, 20)[None]
    logits = []
    for folder in (output / "round-1", output):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == tree["reference"]
        logits.append(AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
    assert not torch.equal(*logits)


def test_damaged_checkpoints_are_passed_over_and_said(
    realign: Callable[..., Any],
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del tree["watch"]
    tree["training"] |= {"max_steps": 5, "save_steps": 1, "save_total_limit": 5}
    whole = tree | {"output": str(tmp_path / "whole")}
    assert realign(whole).exit_code == 0
    with monkeypatch.context() as patch:
        _at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert realign(tree).exit_code == 130
    output = Path(tree["output"])
    (output / "checkpoint-4" / "manifest.json").unlink()
    optimizer = output / "checkpoint-3" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-7] + b"damaged")
    resumed = realign(tree)
    assert resumed.exit_code == 0, resumed.stderr
    assert "passed over" in resumed.stderr
    assert "checkpoint-4: half written" in resumed.stderr
    assert "checkpoint-3: optimizer.pt is corrupt" in resumed.stderr
    assert "going on from" in resumed.stderr
    assert "checkpoint-2" in resumed.stderr
    assert _equal(tree["output"], whole["output"])


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stands(
    realign: Callable[..., Any], tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del tree["watch"]
    save, calls = Trainer._save_optimizer_and_scheduler, []

    def fill_up(self: Trainer, output: str) -> None:
        calls.append(output)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, output)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", fill_up)
        result = realign(tree)
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "checkpoint-4 could not be written" in line
    assert "the disk is full" in line
    assert "checkpoint-2 stands" in line
    output = Path(tree["output"])
    assert newest_complete(output).path == output / "checkpoint-2"
    assert not (output / "checkpoint-4").exists()
    assert realign(tree).exit_code == 0


def test_another_run_in_the_folder_is_refused_before_weights_are_read(
    realign: Callable[..., Any], tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del tree["watch"]
    assert realign(tree).exit_code == 0
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    for options, difference in (
        (["--lambda", "1"], "lambda was 2.0, now 1.0"),
        (["--set", "training.max_steps=8"], "training.max_steps was 4, now 8"),
        (["--set", f"aligned={tree['reference']}"], "pair was"),
    ):
        result = realign(tree, *options)
        assert result.exit_code == 2
        assert difference in result.stderr
    with Path(tree["data"]).open("a") as file:
        file.write('{"prompt": "9+9=", "completion": "18"}\n')
    assert "data was" in realign(tree).stderr
