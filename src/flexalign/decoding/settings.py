"""Settings of transformers' ``generate`` that take the place of a caller's."""

import copy
from typing import Any

__all__ = ["GREEDY", "NEUTRAL", "SAMPLED", "with_settings"]

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""transformers' own defaults: any other value beside greedy decoding draws a warning."""

_WHOLE = {"min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}

GREEDY = {"do_sample": False, **NEUTRAL, **_WHOLE, "num_beams": 1, "num_return_sequences": 1}
"""One greedy response per prompt."""

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **_WHOLE}
SAMPLED |= {"num_beams": 1}
"""Responses drawn from the model's own distribution."""


def with_settings(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the options of ``generate`` with settings changed, wherever they stand."""
    config = options.get("generation_config")
    if config is None:
        return options | changes
    config = copy.deepcopy(config)
    config.update(**changes)
    return {k: v for k, v in options.items() if k not in changes} | {"generation_config": config}
