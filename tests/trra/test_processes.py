"""Two processes take the step that one would: DDP by the trainer, `fully_shard` by hand.

Accelerate has no FSDP on CPU, so the sharded case drives the objective itself.
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
from transformers import AutoModelForCausalLM, PreTrainedModel

from .conftest import lora, make_rows, moved
from .test_trainer import assert_same, dense_loss

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
    for name, model in (("reference", reference), ("aligned", moved(reference))):
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


def run_processes(mode: str, folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    """Run all cases in one set of processes and return what each gave."""
    for case in cases.values():
        case["rows"] = ROWS
        case["aligned"] = "adapter" if case["lora"] else "aligned"
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(PROCESSES),
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
