"""The batch of rows under way: left padded to one width, which they join and leave."""

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from flexalign.serving.engine.runners import Runner

__all__ = ["Frame", "FrameRow"]


class FrameRow(Protocol):
    """What a frame asks of a row: the token that goes in next, and its λ."""

    next_token: int

    def lam(self) -> float:
        """λ of the token that will be chosen."""


_Row = TypeVar("_Row", bound=FrameRow)


class Frame(Generic[_Row]):
    """Rows, their cache and its mask, which says where each row begins.

    Attributes:
        rows: In the order of the batch.
    """

    def __init__(self, runner: Runner) -> None:
        self.rows: list[_Row] = []
        self._runner = runner
        self._device = runner.model.device
        self._cache: Any = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)

    def add(self, rows: Sequence[_Row], cache: Any, mask: Tensor) -> None:
        """Let rows join.

        Args:
            rows: At least one.
            cache: Their own, of :attr:`width` ``mask.shape[1]``; the frame's from here on.
            mask: Shape ``(len(rows), T)``, left padded.
        """
        width = max(self._mask.shape[1], _needed(mask))
        mask = _fitted(mask, width)
        self._runner.reframe(cache, width)
        if self.rows:
            self._runner.reframe(self._cache, width)
            self._runner.append(self._cache, cache)
            mask = torch.cat([_fitted(self._mask, width), mask])
        else:
            self._cache = cache
        self._mask = mask
        self.rows = [*self.rows, *rows]

    def keep(self, places: Sequence[int]) -> None:
        """Let all rows but these leave, and the padding that only they needed."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        if not self.rows:
            self.clear()
            return
        index = torch.tensor(places, device=self._device)
        self._runner.take(self._cache, index)
        mask = self._mask[index]
        width = _needed(mask)
        self._runner.reframe(self._cache, width)
        self._mask = _fitted(mask, width)

    def clear(self) -> None:
        """Let everybody leave."""
        self.rows = []
        self._cache = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)

    def step(self) -> Tensor:
        """Run every row's next token; return the logits of those after, ``(B, V)``, in float32."""
        tokens = torch.tensor([[row.next_token] for row in self.rows], device=self._device)
        lam = torch.tensor([row.lam() for row in self.rows], dtype=torch.float64)
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        logits: Tensor = self._runner.step(tokens, self._mask, positions, lam, self._cache)
        return logits.float()


def _needed(mask: Tensor) -> int:
    """Return the columns that the longest row fills; one at least, as caches have no width 0."""
    return max(1, int(mask.sum(1).amax()))


def _fitted(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))
