"""Rows, a pair and a trainer small enough to run in a test."""

import copy
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flexalign.losses import fused_divergence
from flexalign.training import TrRaConfig
from fresh import Fresh

gc.freeze()  # every `train` collects garbage; what was imported is none

VOCAB = 320
"""Of the tiny model and the tiny tokenizer."""

BUFFERS, BOTH_MODELS, FUSED = 4, 2, 1
"""Matrices of tokens × vocabulary: what every batch makes, and what a measured one makes beside."""


class Modules(NamedTuple):
    """A reference and an aligned model that differ."""

    reference: PreTrainedModel
    aligned: PreTrainedModel


def make_rows(count: int = 8, vocab_size: int = 300, seed: int = 0) -> Dataset:
    """Token rows of different lengths, of which the first few are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(10, vocab_size, (9 + 3 * index % 17,), generator=generator).tolist()
        prompt = 1 + index % 5
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def moved(model: PreTrainedModel, by: float = 0.05, seed: int = 1) -> PreTrainedModel:
    """A copy of a model with noise on every weight."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def modules(tiny_model: Callable[..., PreTrainedModel]) -> Modules:
    reference = tiny_model()
    return Modules(reference, moved(reference))


@pytest.fixture
def adapter_folder(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> tuple[Path, Path]:
    """A reference's folder and that of a PEFT adapter on it, which changes the model."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = tiny_model()
    model.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    peft = get_peft_model(tiny_model(), lora(r=4))
    peft.peft_config["default"].base_model_name_or_path = str(base)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(adapter)
    return base, adapter


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "target_modules": "all-linear", **options})


def lora_state(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name: value.clone() for name, value in model.state_dict().items() if f".{adapter}." in name
    }


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., TrRaConfig]:
    def make(**options: Any) -> TrRaConfig:
        return TrRaConfig(
            **{
                "output_dir": str(tmp_path / "out"),
                "lam": 2.0,
                "max_steps": 1,
                "per_device_train_batch_size": 8,
                "optim": "sgd",
                "learning_rate": 1.0,
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
                "activation_checkpointing": False,
                "dataloader_pin_memory": False,
                **options,
            }
        )

    return make


@pytest.fixture
def make_trainer(
    modules: Modules,
    settings: Callable[..., TrRaConfig],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., Any]:
    """A trainer whose student starts at the reference of the pair of modules."""
    from flexalign.training import TrRaTrainer

    def make(train_dataset: Dataset | None = None, *, models: Any = None, **options: Any) -> Any:
        chosen = models or {
            "model": copy.deepcopy(modules.reference).requires_grad_(True),
            "reference": modules.reference,
            "aligned": modules.aligned,
        }
        peft_config = options.pop("peft_config", None)
        callbacks = options.pop("callbacks", None)
        eval_dataset = options.pop("eval_dataset", None)
        return TrRaTrainer(
            **chosen,
            args=settings(**options),
            train_dataset=make_rows() if train_dataset is None else train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return make


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of every batch: how many matrices of tokens × vocabulary each tensor holds that is made."""
    made: list[list[int]] = []

    def watch(*args: Any, **options: Any) -> Any:
        with Fresh() as fresh:
            result = fused_divergence(*args, **options)
        made.append([math.prod(shape[:-2]) for shape in fresh.of_width(VOCAB)])
        return result

    monkeypatch.setattr("flexalign.training.objective.fused_divergence", watch)
    return made
