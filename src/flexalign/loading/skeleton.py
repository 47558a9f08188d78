"""A model without storage: its modules, names and shapes."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import set_zero3_state

__all__ = ["skeleton"]


def skeleton(config: Any) -> Any:
    """Build a causal language model on the meta device.

    Under ZeRO-3 too, where transformers would cut it up and fill it with numbers.

    Args:
        config: A transformers configuration.
    """
    with torch.device("meta"), set_zero3_state():
        return AutoModelForCausalLM.from_config(config)
