"""A loss or a weight that is no number stops the run and spoils no checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from flexalign.errors import FlexAlignError
from flexalign.training.checkpoints import newest_complete

from .conftest import make_rows


def _poison(trainer: Any, step: int) -> None:
    """Put a NaN into a weight when that step begins."""
    original = trainer.training_step

    def training_step(model: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step:
            with torch.no_grad():
                next(model.parameters())[:] = float("nan")
        return original(model, *args, **kwargs)

    trainer.training_step = training_step


def test_a_loss_that_is_no_number_stops_and_saves_its_batch(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    rows = make_rows(8)
    trainer = make_trainer(
        rows,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        learning_rate=1e-3,
        train_sampling_strategy="sequential",
    )
    _poison(trainer, 3)
    with pytest.raises(FlexAlignError, match=r"the loss is nan in step 4 \(λ=2\)") as caught:
        trainer.train()
    assert not isinstance(caught.value, ValueError)
    output = tmp_path / "out"
    assert newest_complete(output).path == output / "checkpoint-2"
    assert f"{output / 'checkpoint-2'} stands" in str(caught.value)
    with safe_open(output / "nan-batch.safetensors", framework="pt") as saved:
        assert saved.metadata() == {"step": "3", "lambda": "2.0"}
        ids, labels = saved.get_tensor("input_ids"), saved.get_tensor("labels")
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        assert ids[number, :length].tolist() == row["input_ids"]
        assert labels[number, :length].tolist() == row["labels"]


def test_weights_that_are_no_numbers_are_not_saved(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    original = trainer._save_checkpoint

    def save(model: Any, trial: Any) -> None:
        if trainer.state.global_step == 4:
            with torch.no_grad():
                trainer.model.lm_head.weight[3, 5] = float("inf")
        original(model, trial)

    trainer._save_checkpoint = save
    with pytest.raises(FlexAlignError, match=r"after step 4 the weight .* is no number"):
        trainer.train()
    assert newest_complete(tmp_path / "out").path == tmp_path / "out" / "checkpoint-2"


def test_a_stopped_run_leaves_weights_without_the_bad_step(
    make_trainer: Callable[..., Any],
) -> None:
    trainer = make_trainer(max_steps=3, learning_rate=1e-3)
    seen = []
    original = trainer.objective.__call__

    class Spoiled:
        def __call__(self, *args: Any) -> Any:
            loss, metrics = original(*args)
            seen.append(1)
            return (loss * float("inf") if len(seen) == 2 else loss), metrics

    trainer.objective = Spoiled()
    with pytest.raises(FlexAlignError, match="step 2"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_the_command_says_it_in_one_sentence(
    run_cli: Callable[..., Any], tiny_pair: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}"} for n in range(8)]
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    training = {"max_steps": 6, "save_steps": 1, "learning_rate": 1e30, "max_grad_norm": 0.0}
    training |= {"gradient_accumulation_steps": 1, "warmup_steps": 3, "use_cpu": True}
    tree = {
        "reference": str(tiny_pair.reference),
        "aligned": str(tiny_pair.aligned),
        "data": str(traces),
        "output": str(tmp_path / "out"),
        "lambda": 2.0,
        "training": training | {"dataloader_pin_memory": False, "max_length": 32},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    result = run_cli("realign", recipe)
    assert result.exit_code == 1
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "is no number" in error or "the loss is nan" in error
    stands = newest_complete(tmp_path / "out").path
    assert stands is not None
    assert f"{stands} stands" in error
