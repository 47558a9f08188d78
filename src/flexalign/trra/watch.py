"""What is measured while a student learns, as a recipe says it."""

import math
from dataclasses import dataclass
from typing import get_type_hints

from flexalign.errors import ConfigError
from flexalign.trra.settings import check_settings

__all__ = ["Watch", "parse_watch"]


@dataclass(frozen=True)
class Watch:
    """What is measured while the student learns: its own answers to a few prompts.

    Attributes:
        prompts: File of prompts; rows with an ``answer`` give an accuracy too.
        every_steps: Steps between two measurements; the untrained student comes before step 0.
        samples: Prompts used, the first ones of the file.
        max_new_tokens: Where an answer is cut off; it then counts as truncated.
        temperature: Of sampling; 0 is greedy.
        batch_size: Prompts answered at one time.
    """

    prompts: str
    every_steps: int = 50
    samples: int = 32
    max_new_tokens: int = 512
    temperature: float = 1.0
    batch_size: int = 32


def parse_watch(values: object) -> Watch:
    """Check the ``watch`` section of a recipe.

    Raises:
        ConfigError: If a key is unknown, or a value has a wrong type or is out of its range.
    """
    watch = Watch(**check_settings(values, get_type_hints(Watch), "watch", ["prompts"]))
    for name in ("every_steps", "samples", "max_new_tokens", "batch_size"):
        if getattr(watch, name) < 1:
            raise ConfigError(f"watch.{name} must be at least 1, got {getattr(watch, name)}.")
    if not 0 <= watch.temperature < math.inf:
        raise ConfigError(f"watch.temperature must be a number ≥ 0, got {watch.temperature}.")
    return watch
