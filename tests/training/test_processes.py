"""Two processes take the steps that one would: under DDP, `fully_shard`, FSDP2 and ZeRO.

The objective alone is held against a float64 twin, the whole trainer against itself in one process.
Accelerate shards on GPUs only; the worker lets it do the same over gloo.
"""

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexalign.models.loading import load_model
from launching import DISTRIBUTED, launch_environment

from .conftest import lora, make_rows, moved
from .test_trainer import assert_same, dense_loss
from .worker import ddp as one_step
from .worker import trained

pytestmark = pytest.mark.full

PROCESSES = 2
LAM = 2.0


def unequal_rows() -> list[dict[str, Any]]:
    """Eight rows; the second half has several times as many response tokens as the first."""
    rows = [dict(row) for row in make_rows(8)]
    for row in rows[:4]:
        keep = len(row["input_ids"]) - 2
        row["labels"] = [-100] * keep + row["labels"][keep:]
    counts = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert sum(counts[4:]) > 2 * sum(counts[:4])
    return rows


ROWS = unequal_rows()


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: Any,
) -> Path:
    """Reference, aligned, and two adapters on the reference with effect."""
    folder = tmp_path_factory.mktemp("processes")
    reference = tiny_model(tie_word_embeddings=False)
    tied = tiny_model(tie_word_embeddings=True, seed=3)
    models = {"reference": reference, "aligned": moved(reference)}
    models |= {"tied": tied, "tied_aligned": moved(tied)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    for seed, name in enumerate(("adapter", "student")):
        peft = get_peft_model(copy.deepcopy(reference), lora(r=4))
        peft.peft_config["default"].base_model_name_or_path = str(folder / "reference")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in peft.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        peft.save_pretrained(folder / name)
    return folder


def run_processes(
    mode: str, folder: Path, cases: dict[str, Any], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run all cases in one set of processes and return what each gave."""
    for case in cases.values():
        case.setdefault("rows", ROWS)
        case.setdefault("aligned", "adapter" if case["lora"] else "aligned")
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **(os.environ if environment is None else environment),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), mode, str(folder)]
    workers = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
    found: dict[str, Any] = torch.load(folder / f"{mode}.pt", weights_only=True)
    return found


def twin(folder: Path, student: Any, adapters: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """The dense loss of all rows in one process, in float64, and its gradients."""
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference").double()
    if adapters:
        base = copy.deepcopy(reference)
        aligned: Any = PeftModel.from_pretrained(base, folder / "adapter").double()
    else:
        aligned = AutoModelForCausalLM.from_pretrained(folder / "aligned").double()
    student = student.double().eval()
    loss = dense_loss(student, reference, aligned, Dataset.from_list(ROWS), LAM)
    loss.backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


DDP = {
    "one batch": {"lora": False, "options": {"per_device_train_batch_size": 4}},
    "accumulated": {
        "lora": False,
        "options": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    },
    "shared base": {
        "lora": True,
        "options": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    },
}
SHARDED = {
    "full": {"lora": False, "head_is_a_unit": False, "checkpointing": False},
    "full, head apart": {"lora": False, "head_is_a_unit": True, "checkpointing": True},
    "shared base": {"lora": True, "head_is_a_unit": False, "checkpointing": True},
    "shared base, head apart": {"lora": True, "head_is_a_unit": True, "checkpointing": False},
}


@pytest.fixture(scope="module")
def ddp(folder: Path) -> dict[str, Any]:
    return run_processes("ddp", folder, DDP)


@pytest.fixture(scope="module")
def sharded(folder: Path) -> dict[str, Any]:
    return run_processes("sharded", folder, SHARDED)


@pytest.mark.parametrize("case", DDP)
def test_two_processes_with_unequal_responses_take_one_step(
    folder: Path, ddp: dict[str, Any], case: str
) -> None:
    found, shared = ddp[case], DDP[case]["lora"]
    assert found["wrapper"] == "DistributedDataParallel"
    assert found["processes"] == PROCESSES

    student = AutoModelForCausalLM.from_pretrained(folder / "reference")
    if shared:
        student = get_peft_model(student, lora(r=4))
        start = {n: v for n, v in found["before"].items() if ".aligned." not in n}
        assert not student.load_state_dict(start, strict=False).unexpected_keys
    loss, gradients = twin(folder, student, shared)
    assert_same(found["gradients"], gradients)
    assert found["log"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["log"]["divergence"] == pytest.approx(loss, rel=1e-4)
    assert found["log"]["tokens_seen"] == sum(len(row["input_ids"]) for row in ROWS)


def test_two_processes_draw_the_lambdas_of_one(folder: Path) -> None:
    case = {"lora": True, "lam": {"low": -0.5, "high": 3}, "rows": ROWS, "aligned": "adapter"}
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found = run_processes("ddp", folder, {"range": case | {"options": options}})["range"]
    assert found["wrapper"] == "DistributedDataParallel"

    alone = one_step(folder, case | {"options": {"per_device_train_batch_size": 8}})
    assert alone["processes"] == 1
    gradients = {n: g.double() for n, g in alone["gradients"].items() if "lora_B.default" in n}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert_same(found["gradients"], gradients)
    for name in ("divergence", "divergence_low", "divergence_high", "lambda", "kl_aligned"):
        assert found["log"][name] == pytest.approx(alone["log"][name], rel=1e-4), name


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_two_processes_teach_two_prompts_as_one_does(folder: Path, adapter: bool) -> None:
    words = [f"{number}+{number}=" * (1 + number % 3) for number in range(8)]
    rows = [
        {
            "prompt": [{"role": "user", "content": word}],
            "completion": [{"role": "assistant", "content": "again " * (1 + number)}],
        }
        for number, word in enumerate(words)
    ]
    case = {"lora": adapter, "rows": rows, "aligned": "reference", "system": "check"}
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found = run_processes("ddp", folder, {"prompts": case | {"options": options}})["prompts"]
    assert found["wrapper"] == "DistributedDataParallel"

    alone = one_step(folder, case | {"options": {"per_device_train_batch_size": 8}})
    gradients = {name: gradient.double() for name, gradient in alone["gradients"].items()}
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    assert_same(found["gradients"], gradients)
    for name in ("divergence", "kl_reference", "kl_aligned", "tokens_seen"):
        assert found["log"][name] == pytest.approx(alone["log"][name], rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_parameters_give_the_single_process_loss_and_gradients(
    folder: Path, sharded: dict[str, Any], case: str
) -> None:
    found, shared = sharded[case], SHARDED[case]["lora"]
    assert found["all_sharded"]
    assert found["teachers_sharded"]

    student = AutoModelForCausalLM.from_pretrained(folder / "reference")
    if shared:
        student = PeftModel.from_pretrained(student, folder / "student", is_trainable=True)
    loss, gradients = twin(folder, student, shared)
    assert float(found["loss"]) == pytest.approx(loss, rel=1e-5)
    assert_same(found["gradients"], gradients)
    assert set(found["gradients"]) == set(gradients)


STEPS = 4
ZERO = Path(sys.prefix) / "deepspeed"
"""Where make test-full puts DeepSpeed, apart from the environment that all other tests run in."""

MODELS = {
    "full": {"reference": "reference", "aligned": "aligned", "lora": False},
    "tied": {"reference": "tied", "aligned": "tied_aligned", "lora": False},
    "shared base": {"reference": "reference", "aligned": "adapter", "lora": True},
    "range": {
        "reference": "reference",
        "aligned": "adapter",
        "lora": True,
        "lam": {"low": -0.5, "high": 3},
    },
}


def whole_runs(way: str, processes: int, **options: Any) -> dict[str, Any]:
    """Each of MODELS for STEPS steps at one global batch, and the first resumed half way."""
    common = {
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4 // processes,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "bf16": False,
    } | options
    rows = [dict(row) for row in make_rows(16)]
    runs = {
        name: models | {"output": f"{way} {name}", "options": common, "rows": rows}
        for name, models in MODELS.items()
    }
    return runs | {"resumed": runs["full"] | {"resume": f"checkpoint-{STEPS // 2}"}}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process gives for each of MODELS."""
    runs = whole_runs("alone", 1, use_cpu=True)
    return {name: trained(folder, runs[name]) for name in MODELS}


@pytest.fixture(scope="module")
def fsdp2(folder: Path) -> dict[str, Any]:
    config = DISTRIBUTED / "fsdp2_1x8.yaml"
    environment = launch_environment(config, "--num_processes", "2", "--mixed_precision", "no")
    return run_processes("trained", folder, whole_runs("fsdp2", 2, use_cpu=True), environment)


def zero_environment(folder: Path) -> dict[str, str]:
    """Where DeepSpeed is, and where it compiles what it needs.

    A process that is killed while it compiles leaves a lock in the user's own folder, for which all
    later ones wait without an end.
    """
    return {
        "PYTHONPATH": str(ZERO),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def zero(request: pytest.FixtureRequest, folder: Path) -> tuple[str, dict[str, Any]]:
    if not ZERO.is_dir():
        pytest.skip("DeepSpeed is not installed; make test-full puts it into .venv/deepspeed")
    config = DISTRIBUTED / f"{request.param}_1x8.yaml"
    environment = launch_environment(config, "--num_processes", "2", "--mixed_precision", "no")
    environment |= zero_environment(folder)
    runs = whole_runs(request.param, 2)
    return request.param, run_processes("trained", folder, runs, environment)


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    adapter = checkpoint / "adapter_model.safetensors"
    if adapter.exists():
        return dict(load_file(adapter))
    return dict(load_model(checkpoint).state_dict())


def same_training(folder: Path, way: str, name: str, found: Any, expected: Any) -> None:
    """The losses of every step, and the weights in the last checkpoint's safetensors."""
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    weights, single = (
        saved_weights(folder / f"{each} {name}" / f"checkpoint-{STEPS}") for each in (way, "alone")
    )
    assert set(weights) == set(single)
    for key, value in single.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_fsdp2_shards_all_three_models_and_trains_as_one_process_does(
    folder: Path, fsdp2: dict[str, Any], alone: dict[str, Any], name: str
) -> None:
    assert fsdp2[name]["wrapper"].startswith("FSDP")
    assert fsdp2[name]["student_split"]
    assert fsdp2[name]["teachers_split"] == ([] if MODELS[name]["lora"] else [True, True])
    same_training(folder, "fsdp2", name, fsdp2[name], alone[name])


def test_fsdp2_resumes(fsdp2: dict[str, Any]) -> None:
    assert fsdp2["resumed"]["losses"] == pytest.approx(fsdp2["full"]["losses"], rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_zero_shards_what_its_stage_says_and_trains_as_one_process_does(
    folder: Path, zero: tuple[str, dict[str, Any]], alone: dict[str, Any], name: str
) -> None:
    way, runs = zero
    split = way == "zero3"
    assert runs[name]["wrapper"] == "DeepSpeedEngine"
    assert runs[name]["student_split"] is split
    assert runs[name]["teachers_split"] == ([] if MODELS[name]["lora"] else [split, split])
    same_training(folder, way, name, runs[name], alone[name])


def test_zero_resumes(zero: tuple[str, dict[str, Any]]) -> None:
    _, runs = zero
    assert runs["resumed"]["losses"] == pytest.approx(runs["full"]["losses"], rel=1e-6)


@pytest.fixture(scope="module")
def on_policy(folder: Path) -> Callable[..., dict[str, Any]]:
    """Runs of two processes that sample all of their batches."""

    def run(way: str, environment: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
        sampling = {"rollouts": 1.0, "rollout_max_new_tokens": 12, "max_length": 64}
        runs = whole_runs(f"sampled {way}", 2, **sampling, **options)
        names = ("full", "shared base")
        return run_processes("trained", folder, {name: runs[name] for name in names}, environment)

    return run


@pytest.fixture(scope="module")
def sampled(on_policy: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return on_policy("ddp", use_cpu=True, ddp_backend="gloo")


def test_fsdp2_samples_what_whole_students_do(
    on_policy: Callable[..., dict[str, Any]], sampled: dict[str, Any]
) -> None:
    config = DISTRIBUTED / "fsdp2_1x8.yaml"
    environment = launch_environment(config, "--num_processes", "2", "--mixed_precision", "no")
    found = on_policy("fsdp2", environment, use_cpu=True)
    for name, run in found.items():
        assert run["student_split"]
        assert run["losses"] == pytest.approx(sampled[name]["losses"], rel=1e-4)


def test_zero3_samples_what_whole_students_do(
    on_policy: Callable[..., dict[str, Any]], sampled: dict[str, Any], folder: Path
) -> None:
    if not ZERO.is_dir():
        pytest.skip("DeepSpeed is not installed; make test-full puts it into .venv/deepspeed")
    config = DISTRIBUTED / "zero3_1x8.yaml"
    environment = launch_environment(config, "--num_processes", "2", "--mixed_precision", "no")
    environment |= zero_environment(folder)
    found = on_policy("zero3", environment)
    for name, run in found.items():
        assert run["student_split"]
        assert run["losses"] == pytest.approx(sampled[name]["losses"], rel=1e-4)
