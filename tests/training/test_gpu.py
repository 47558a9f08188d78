"""A step on a CUDA device in bfloat16 comes near the dense loss on the CPU in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import Modules, make_rows
from .test_trainer import dense_loss

pytestmark = pytest.mark.gpu


def test_bfloat16_on_the_device_is_near_float64_on_the_cpu(
    make_trainer: Callable[..., Any], modules: Modules
) -> None:
    rows = make_rows(8)
    reference, aligned = (copy.deepcopy(model).double() for model in modules)
    expected = float(dense_loss(copy.deepcopy(reference), reference, aligned, rows, 2.0).detach())
    trainer = make_trainer(rows, use_cpu=False, bf16=True)
    trainer.train()
    assert trainer.model.device.type == "cuda"
    assert trainer.state.log_history[0]["divergence"] == pytest.approx(expected, rel=0.05)
