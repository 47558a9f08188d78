"""Sampling in which a row's tokens depend on its own seed, and not on the batch.

Gumbel-max trick: the index of the largest of logits plus independent Gumbel noise is a sample from
their softmax. The noise here is a function of only (seed, index of the generated token, token id).
It does not depend on the other rows, so an interrupted batch can be repeated with other rows in it.
Two settings of a dial that use one seed get the same noise, so their difference has a smaller
variance (common random numbers).
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper

_LEAST_TEMPERATURE = 1e-8
"""Lower temperatures are raised to this one, at which only the likeliest token is sampled and the
division of logits does not overflow."""

_INCREMENT = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Samples each row's next token with that row's seed; use it with greedy decoding.

    The returned scores leave only the sampled token, which ``do_sample=False`` then chooses. It is
    sampled from softmax(logits / temperature), limited to the ``top_k`` likeliest tokens, then to the
    smallest set of likeliest tokens that has a probability of ``top_p``, then to those that have at
    least ``min_p`` of the likeliest one's probability, as transformers does.

    Attributes:
        seeds: One for each row of the batch. For a batch of some of the rows, see :meth:`keep`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
    ) -> None:
        """Create the sampling of a batch.

        Args:
            seeds: One for each row.
            temperature: Above 0.
            top_p: Probability mass sampled from, 0 < top_p ≤ 1.
            top_k: Number of likeliest tokens sampled from; 0 for all.
            min_p: Least probability, as a share of the likeliest token's, 0 ≤ min_p ≤ 1.
        """
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64)
        self._temperature = max(temperature, _LEAST_TEMPERATURE)
        self._top_p = top_p
        self._top_k = TopKLogitsWarper(top_k) if top_k else None
        self._min_p = MinPLogitsWarper(min_p) if min_p else None
        self._prompt_tokens: int | None = None
        self._written = torch.zeros_like(self.seeds)

    def keep(self, rows: Tensor, written: Sequence[int] | None = None) -> "SeededSampling":
        """Return the same sampling for some of the rows, from its first token.

        Args:
            rows: The rows, shape ``(n,)``.
            written: Per kept row, the tokens of its response that its next batch begins with; by
                default as many as in this one.
        """
        rows = rows.to(self.seeds.device)
        kept = copy.copy(self)
        kept.__dict__.update(
            seeds=self.seeds[rows],
            _prompt_tokens=None,
            _written=self._written[rows] if written is None else torch.tensor(list(written)),
        )
        return kept

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that are 0 at each row's token and −inf elsewhere, shape ``(B, V)``."""
        if self._prompt_tokens is None:
            self._prompt_tokens = input_ids.shape[1]
        index = (self._written + input_ids.shape[1] - self._prompt_tokens).to(scores.device)
        logits = scores.float() / self._temperature
        if self._top_k is not None:
            logits = self._top_k(input_ids, logits)
        logits, ids = _likeliest(logits, self._top_p)
        if self._min_p is not None:
            logits = self._min_p(input_ids, logits)
        noise = _gumbel(self.seeds.to(scores.device), index, ids)
        chosen = ids.gather(1, (logits.double() + noise).argmax(1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _likeliest(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the logits and ids of tokens in the top p, ``(B, K)``; −inf pads shorter rows."""
    if top_p == 1:
        return logits, torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    ordered, ids = logits.sort(descending=True, dim=-1, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    dropped = before >= top_p
    dropped[:, 0] = False  # keep the likeliest also for a top_p that is 0 in float32
    width = int((~dropped).sum(-1).amax())
    return ordered.masked_fill(dropped, -torch.inf)[:, :width], ids[:, :width]


def _gumbel(seeds: Tensor, index: Tensor, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise for the token `index`, ``(B,)``, of each row, shape of `ids`."""
    row = _mixed(_mixed(seeds) + index)[:, None]
    bits = (_mixed(row ^ _mixed(ids)) >> 11) & ((1 << 53) - 1)
    uniform = (bits.double() + 0.5) / 2**53
    return -(-uniform.log()).log()


def _mixed(state: Tensor) -> Tensor:
    """Return SplitMix64's output for every state (Steele, Lea and Flood 2014), int64 wrapping."""
    z = state + _INCREMENT
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift to the right, filling with zeros instead of the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
