"""A model's confidence in its answer, measured while transformers' ``generate`` runs."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria

from flexalign.lambdas import Adaptive, Exit


class LogProbRecorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps the log-probabilities of the next token.

    It must be the first of the processors. Then they are the model's own, at temperature 1.

    Attributes:
        log_probs: The log-probabilities of the latest step, shape ``(B, V)``, in nats.
    """

    log_probs: Tensor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Keep the log-probabilities and return the scores unchanged."""
        self.log_probs = scores.log_softmax(-1)
        return scores


class RowTracker(StoppingCriteria):  # type: ignore[misc]
    """A stopping criterion that knows which of the others ended a row, and were not limits.

    ``generate`` gives it all of them (:meth:`use_ends`).
    """

    def __init__(self) -> None:
        """Track without criteria; :meth:`use_ends` sets them."""
        self._ends: list[StoppingCriteria] = []

    def use_ends(self, criteria: Iterable[StoppingCriteria]) -> None:
        """Use those of a generation's stopping criteria that end a response and are not limits."""
        limits = (MaxLengthCriteria, MaxTimeCriteria, RowTracker)
        self._ends = [one for one in criteria if not isinstance(one, limits)]

    def find_ends(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return which rows have an end, and which of them by a token that is no text: both ``(B,)``."""
        has_end = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        is_end_token = has_end.clone()
        for end in self._ends:
            found = end(input_ids, scores, **kwargs)
            has_end |= found
            # Only the criterion for end tokens has this attribute. A stop string is part of the text.
            if hasattr(end, "eos_token_id"):
                is_end_token |= found
        return has_end, is_end_token


class ConfidenceTracker(RowTracker):
    """Tracks each row of a generation: its confidence, and whether its answer has ended.

    The probability of the answer and its smallest token probability cannot rise with more tokens.
    A row is therefore stopped as soon as the one that its policy measures is below its threshold.

    Attributes:
        recorder: The recorder. Give it to ``generate`` as a logits processor with the tracker.
        length: Number of tokens of each row, with the token that ends it. All shapes are ``(B,)``.
        counted: The same without the token that ends it, as responses are counted.
        ended: Whether the answer has ended, and was not cut off by a limit.
    """

    def __init__(
        self,
        policies: Sequence[Adaptive | Exit],
        thresholds: Sequence[float],
        device: torch.device,
        limits: Sequence[int] | None = None,
    ) -> None:
        """Track a batch.

        Args:
            policies: The policy of each row, which names its measure of confidence.
            thresholds: The smallest accepted confidence of each row.
            device: The batch's device.
            limits: The most tokens of each row, at which it is stopped without an end; None for
                no limits but those of the generation.
        """
        super().__init__()
        self.recorder = LogProbRecorder()
        rows = (len(policies),)
        by_least = [policy.measure == "min_token_probability" for policy in policies]
        by_samples = [policy.measure == "agreement" for policy in policies]

        self._by_least = torch.tensor(by_least, device=device)
        self._by_samples = torch.tensor(by_samples, device=device)
        self._thresholds = torch.tensor(thresholds, dtype=torch.float64, device=device)
        self._limits = None if limits is None else torch.tensor(limits, device=device)

        # Both in nats. A row without tokens has a confidence of 1.
        self._log_total = torch.zeros(rows, dtype=torch.float64, device=device)
        self._log_least = torch.zeros(rows, dtype=torch.float64, device=device)

        self._dropped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.counted = torch.zeros(rows, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)

    @property
    def confidence(self) -> Tensor:
        """The answer's probability or its smallest token probability, ``(B,)``, in float64."""
        return torch.where(self._by_least, self._log_least, self._log_total).exp()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Count the token that was chosen; return which rows can be stopped, shape ``(B,)``."""
        chosen = self.recorder.log_probs.gather(-1, input_ids[:, -1:])[:, 0]
        has_end, is_end_token = self.find_ends(input_ids, scores, **kwargs)
        return self.take(chosen, has_end, is_end_token)

    def take(self, log_probs: Tensor, has_end: Tensor, is_end_token: Tensor) -> Tensor:
        """Count one more token of each row; shapes are ``(B,)``.

        Args:
            log_probs: The tokens' log-probabilities, at temperature 1, in nats.
            has_end: Whether the answer ends with the token, and not by a limit.
            is_end_token: Whether the token only ends the answer and is not part of it.

        Returns:
            Which rows can be stopped, because their confidence is below the threshold.
        """
        is_open = ~(self.ended | self._dropped)
        chosen = log_probs.double().where(is_open, 0.0)
        self._log_total += chosen
        self._log_least = self._log_least.minimum(chosen)

        self.length += is_open
        self.counted += is_open & ~is_end_token
        self.ended |= is_open & has_end

        is_low = ~self._by_samples & (self.confidence < self._thresholds)
        self._dropped |= is_open & is_low
        if self._limits is not None:
            self._dropped |= ~self.ended & (self.length >= self._limits)
        return self._dropped
