"""One process of several: run by test_processes.py, which compares with a single process.

``python worker.py MODE FOLDER``, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, and for
`trained` what ``accelerate launch`` sets. FOLDER holds ``cases.json`` and the models; rank 0 writes
``MODE.pt``: what each case gave.
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from flexalign.data.prompting import PromptSettings
from flexalign.models.adapters import inner_model
from flexalign.models.prompted import PromptedModel
from flexalign.training import TrRaConfig, TrRaTrainer
from flexalign.training.forward import HeadForm
from flexalign.training.models import Teacher
from flexalign.training.objective import Objective

VOCAB = 320
LAM = 2.0
RANK = int(os.environ.get("RANK", "0"))


def ddp(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One step of the trainer, each process with rows of its own."""
    aligned: Any = str(folder / case["aligned"])
    if "system" in case:
        aligned = PromptedModel(aligned, PromptSettings(system=case["system"]))
    trainer = TrRaTrainer(
        reference=str(folder / "reference"),
        aligned=aligned,
        args=TrRaConfig(
            output_dir=str(folder / "out"),
            lam=case.get("lam", LAM),
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
            **case["options"],
        ),
        train_dataset=Dataset.from_list(case["rows"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "reference"),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if case["lora"] else None,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {
        "before": before,
        "gradients": {n: before[n] - p.detach() for n, p in trainer.model.named_parameters()},
        "wrapper": type(trainer.model_wrapped).__name__,
        "log": trainer.state.log_history[0],
        "processes": trainer.accelerator.num_processes,
    }


def trained(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Steps of the trainer over models that accelerate has placed, and their checkpoints."""
    trainer = TrRaTrainer(
        reference=str(folder / case["reference"]),
        aligned=str(folder / case["aligned"]),
        args=TrRaConfig(
            output_dir=str(folder / case["output"]), lam=case.get("lam", LAM), **case["options"]
        ),
        train_dataset=Dataset.from_list(case["rows"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "reference"),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if case["lora"] else None,
    )
    teachers = (trainer.objective.reference, trainer.objective.aligned)
    own = [teacher.model for teacher in teachers if not teacher.shares_student]
    teachers_split = [all(map(_is_split, model.parameters())) for model in own]
    resume = case.get("resume")
    trainer.train(resume_from_checkpoint=str(folder / case["output"] / resume) if resume else None)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "wrapper": type(trainer.model_wrapped).__name__,
        "student_split": all(map(_is_split, trainer.model.parameters())),
        "teachers_split": teachers_split,
    }


def _is_split(parameter: Any) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def _fsdp_on_cpu() -> None:
    """Let accelerate shard over gloo what it shards over NCCL: it refuses by the device alone."""
    original = AcceleratorState.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = options["fsdp_plugin"]

    AcceleratorState.__init__ = init


def _zero_on_cpu() -> None:
    """Let accelerate give DeepSpeed the backend that it gives plain processes on CPU."""

    def choose(*_: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_CPU

    PartialState._prepare_backend = choose


def sharded(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One backward pass of the objective over models that `fully_shard` has split."""
    load = AutoModelForCausalLM.from_pretrained
    if case["lora"]:
        student = PeftModel.from_pretrained(
            load(folder / "reference"), folder / "student", is_trainable=True
        )
        student.load_adapter(folder / case["aligned"], "aligned", is_trainable=False)
        student.set_adapter("default")
        sides = [(student, ()), (student, ("aligned",))]
    else:
        student = load(folder / "reference")
        teachers = (load(folder / name).requires_grad_(False) for name in ("reference", "aligned"))
        sides = [(model, None) for model in teachers]
    student.train()
    if case["checkpointing"]:
        student.gradient_checkpointing_enable()
        if case["lora"]:
            student.enable_input_require_grads()
    models = {id(model): model for model in (student, *(model for model, _ in sides))}.values()
    forms = {id(model): HeadForm.of(model, VOCAB) for model in models}
    for model in models:
        _shard(model, case["head_is_a_unit"])
    # Before the forward pass: without a backward pass, a root stays gathered after it.
    teachers_sharded = all(isinstance(p, DTensor) for model, _ in sides for p in model.parameters())
    objective = Objective(
        student,
        forms[id(student)],
        *(
            Teacher(model, adapters, forms[id(model)], shares_student=model is student)
            for model, adapters in sides
        ),
        divergence="reverse",
        beta=0.5,
        gate=None,
        chunk_size=16,
    )
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    per_rank = len(case["rows"]) // dist.get_world_size()
    batch = collate(case["rows"][RANK * per_rank : (RANK + 1) * per_rank])
    mask = batch.pop("labels")[:, 1:] != -100
    num_items = mask.sum()
    dist.all_reduce(num_items)
    loss, _ = objective(student, batch, mask, LAM, num_items)
    (loss * dist.get_world_size()).backward()
    dist.all_reduce(loss.detach_())
    parameters = dict(student.named_parameters())
    return {
        "loss": loss,
        "all_sharded": all(isinstance(p, DTensor) for p in parameters.values()),
        "teachers_sharded": teachers_sharded,
        "gradients": {
            name: p.grad.full_tensor() for name, p in parameters.items() if p.grad is not None
        },
    }


def _shard(model: nn.Module, head_is_a_unit: bool) -> None:
    inner: Any = inner_model(model)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    if head_is_a_unit:
        fully_shard(inner.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    cases = json.loads((folder / "cases.json").read_text())
    if mode == "sharded":
        dist.init_process_group("gloo")  # for DDP the trainer does it
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _fsdp_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _zero_on_cpu()
    modes: dict[str, Callable[..., dict[str, Any]]] = {
        "ddp": ddp,
        "sharded": sharded,
        "trained": trained,
    }
    run = modes[mode]
    found = {name: run(folder, case) for name, case in cases.items()}
    if RANK == 0:
        torch.save(found, folder / f"{mode}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of DeepSpeed's may outlive the interpreter, which C++ answers by an abort


if __name__ == "__main__":
    main()
