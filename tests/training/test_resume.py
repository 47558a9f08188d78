"""A run that stops at a checkpoint and goes on is, bit for bit, the run that never stopped."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from flexalign.errors import CheckpointError

from .conftest import Modules, lora, make_rows

RAMP = {"kind": "linear", "start": 0, "end": 3, "steps": 6}
RUN = {
    "max_steps": 6,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": None,
    "lam": RAMP,
}


class _StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def student(modules: Modules) -> Any:
    model = copy.deepcopy(modules.reference).requires_grad_(True)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return model


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"packing": True, "max_length": 48, "per_device_train_batch_size": 1},
        {"lora": True},
        {"shared": True, "packing": True, "max_length": 48},
    ],
    ids=["full", "full-packed", "lora", "shared-packed"],
)
def test_stopped_and_resumed_is_uninterrupted(
    make_trainer: Callable[..., Any],
    modules: Modules,
    adapter_folder: tuple[Path, Path],
    tmp_path: Path,
    case: dict[str, Any],
) -> None:
    case = dict(case)
    shared, adapter = case.pop("shared", False), case.pop("lora", False)
    peft = {"peft_config": lora(lora_dropout=0.1)} if shared or adapter else {}

    def models() -> dict[str, Any]:
        if shared:
            return dict(zip(("reference", "aligned"), map(str, adapter_folder), strict=True))
        return {"model": student(modules), "aligned": modules.aligned}

    def run(name: str, stop: int | None = None, resume: bool = False) -> Any:
        trainer = make_trainer(
            make_rows(40),
            models=models(),
            callbacks=[_StopAfter(stop)] if stop else None,
            output_dir=str(tmp_path / name),
            **peft,
            **{**RUN, **case},
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = run("whole")
    stopped = run("parts", stop=4)
    assert stopped.state.global_step == 4
    torch.manual_seed(99)  # what a new process would not know either
    resumed = run("parts", resume=True)

    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    logs = [trainer.state.log_history[4:6] for trainer in (whole, resumed)]
    for key in ("tokens_seen", "lambda", "divergence", "kl_reference", "grad_norm"):
        assert [log[key] for log in logs[0]] == [log[key] for log in logs[1]], key
    assert logs[0][-1]["tokens_seen"] > logs[0][0]["tokens_seen"] > 0


def test_a_damaged_checkpoint_that_is_named_is_not_resumed_from(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_trainer(make_rows(12), callbacks=[_StopAfter(2)], **RUN)
    trainer.train()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    (checkpoint / "model.safetensors").write_bytes(b"x")
    again = make_trainer(make_rows(12), **RUN)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 cannot be resumed from: .*corrupt"):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 0
