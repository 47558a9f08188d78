from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerFast

from flexalign.training import Outcome, adapt


@pytest.fixture(autouse=True)
def _quiet() -> None:
    disable_progress_bars()


@pytest.fixture
def traces() -> Dataset:
    rows = [
        {"prompt": f"{n}+{n}=", "completion": f"<think>again {n}</think> {2 * n} {n * n}"}
        for n in range(8)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def preferences() -> Dataset:
    rows = [
        {"prompt": f"{n}+{n}=", "chosen": f" {2 * n}", "rejected": f" it is {n * n} and more"}
        for n in range(8)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def training() -> dict[str, Any]:
    """Small settings of a training."""
    return {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_length": 64,
    }


@pytest.fixture
def train(
    tmp_path: Any, tiny_tokenizer: PreTrainedTokenizerFast, training: dict[str, Any]
) -> Callable[..., Outcome]:
    """Train an adapter into ``tmp_path/name`` with small settings."""

    def run(base: Any, data: Dataset, *, name: str = "out", **settings: Any) -> Outcome:
        settings["training"] = training | settings.pop("training", {})
        return adapt(base, data, tmp_path / name, tokenizer=tiny_tokenizer, **settings)

    return run
