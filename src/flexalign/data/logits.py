"""Sampling settings beside temperature and top_p: limits on tokens, penalties and biases.

The limits (``top_k``, ``min_p``) remove unlikely tokens; the penalties and the biases change logits,
also for greedy decoding. :mod:`flexalign.generation.penalties` applies them. Two settings concern the
thinking alone: a budget of tokens, and a bias on its end
(:mod:`flexalign.generation.thinking_limits`).
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from flexalign.errors import ConfigError


@dataclass(frozen=True)
class LogitsSettings:
    """How a distribution is changed before a token is chosen from it.

    Attributes:
        top_k: Number of likeliest tokens to choose from; 0 for all.
        min_p: Least probability of a token, as a share of the likeliest one's; 0 for none.
        repetition_penalty: Logits of tokens in the prompt or the response are divided by it if
            positive, and multiplied if negative (Keskar et al. 2019); 1 for none.
        presence_penalty: Subtracted from the logits of tokens in the response.
        frequency_penalty: Subtracted once for each time that a token is in the response.
        logit_bias: Pairs (token id, number added to its logit).
        thinking_budget: Tokens of thinking after which the thinking is closed as the chat template
            closes it; None for no limit. The tokens that close it are a part of the response.
        end_of_thinking_bias: Added to the logit of the closing tag's first token, in the thinking
            alone; above 0 the thinking ends sooner.

    Raises:
        ConfigError: If a value is out of its range.
    """

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    thinking_budget: int | None = None
    end_of_thinking_bias: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigError(f"top_k must be a whole number ≥ 0 (0: all), got {self.top_k!r}.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be between 0 and 1, got {self.min_p!r}.")

        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty must be a number above 0, got {self.repetition_penalty!r}."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, got {getattr(self, name)!r}.")

        budget = self.thinking_budget
        if budget is not None and (
            isinstance(budget, bool) or not isinstance(budget, int) or budget < 0
        ):
            raise ConfigError(f"thinking_budget must be a whole number ≥ 0, got {budget!r}.")
        end_bias = self.end_of_thinking_bias
        if (
            isinstance(end_bias, bool)
            or not isinstance(end_bias, int | float)
            or not math.isfinite(end_bias)
        ):
            raise ConfigError(f"end_of_thinking_bias must be a finite number, got {end_bias!r}.")

        for token, bias in self.logit_bias:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ConfigError(f"logit_bias must have token ids ≥ 0, got {token!r}.")
            if not math.isfinite(bias):
                raise ConfigError(f"logit_bias must have finite numbers, got {bias!r}.")

    @property
    def has_penalties(self) -> bool:
        """Whether logits are changed before tokens are limited: penalties or biases."""
        limits = {"top_k", "min_p"}
        return any(name not in limits for name in self.to_json())

    @property
    def limits_thinking(self) -> bool:
        """Whether the thinking has a budget, or its end a bias."""
        return self.thinking_budget is not None or self.end_of_thinking_bias != 0

    def refuse_thinking_limits(
        self, where: str, names: tuple[str, ...] = ("thinking_budget", "end_of_thinking_bias")
    ) -> None:
        """Refuse a budget of the thinking or a bias on its end.

        Args:
            where: What does not apply them, for the message.
            names: Those that it does not apply.

        Raises:
            ConfigError: If one of them is set.
        """
        given = [name for name in names if name in self.to_json()]
        if given:
            raise ConfigError(
                f"{' and '.join(given)}: {where} cannot apply this, only the local engine can; leave "
                "it out, or run the model on this machine."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings that have an effect, by name."""
        given = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        changed = {name: value for name, (value, default) in given.items() if value != default}
        if self.logit_bias:
            changed["logit_bias"] = {str(token): bias for token, bias in self.logit_bias}
        return changed

    def require_tokens(self, vocabulary: int) -> None:
        """Check that every biased token is one of a vocabulary of this many tokens.

        Raises:
            ConfigError: If one is not.
        """
        outside = [token for token, _ in self.logit_bias if token >= vocabulary]
        if outside:
            raise ConfigError(
                f"logit_bias has the token id {outside[0]}; this model's are 0 to {vocabulary - 1}."
            )
