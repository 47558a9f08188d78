"""How much an engine takes on."""

from dataclasses import dataclass

from flexalign.errors import ConfigError

__all__ = ["EngineLimits"]


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine takes on.

    Attributes:
        rows: Answers written at a time.
        queue: Answers that may wait; more are refused.
        prefill_tokens: Prompt tokens, padding included, that one step may prefill, so that the
            answers under way do not wait long; a longer prompt is prefilled alone.
    """

    rows: int = 32
    queue: int = 256
    prefill_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
