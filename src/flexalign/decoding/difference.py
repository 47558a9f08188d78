"""What a pair's dial turns: where two models differ on given responses, and by how much.

At every response token both models give a distribution of what comes next. Their total variation
(TV) says how much the two differ there; the token that loses and the token that gains the most
probability say in what. Positions with the same two tokens are one *shift*: "`again` gives way to
`;`". λ turns each of them; beyond [0, 1] it turns the noise too, in which the two merely differ.

The gate that is proposed (:mod:`flexalign.decoding.gate`) lies between the two.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flexalign._modes import evaluating
from flexalign.decoding.gate import NO_DIFFERENCE, propose_gate
from flexalign.decoding.reading import Row, read_logits
from flexalign.errors import DataError
from flexalign.fusion import total_variation
from flexalign.pairing import ModelPair

__all__ = ["Difference", "Shift", "TokenChange", "measure_difference"]

_CONTEXT_TOKENS = 12
_COLUMNS = ("row", "position", "variation", "falls", "rises", "falls_reference", "falls_aligned",
            "rises_reference", "rises_aligned")  # fmt: skip


@dataclass(frozen=True)
class TokenChange:
    """A token's expected number per 1000 response tokens, under each model.

    Attributes:
        token: The token, as text.
        reference: Its number under the reference.
        aligned: Its number under the aligned model.
        log_change: ln(aligned / reference).
    """

    token: str
    reference: float
    aligned: float
    log_change: float


@dataclass(frozen=True)
class Shift:
    """Positions above the gate at which one token gives way to another.

    Attributes:
        falls: The token that loses most.
        rises: The token that gains most.
        positions: How many there are.
        variation: Their mean total variation.
        falls_reference: Mean probability of `falls` under the reference.
        falls_aligned: The same under the aligned model.
        rises_reference: Mean probability of `rises` under the reference.
        rises_aligned: The same under the aligned model.
        context: The text before the position where the two differ most.
    """

    falls: str
    rises: str
    positions: int
    variation: float
    falls_reference: float
    falls_aligned: float
    rises_reference: float
    rises_aligned: float
    context: str


@dataclass(frozen=True)
class Difference:
    """How two models differ on given responses.

    Attributes:
        rows: Responses looked at.
        tokens: Their tokens.
        variation: Mean total variation per token.
        gate: The gate τ that is proposed; None if the two differ nowhere by more than 0.0001.
        share: Share of the tokens above the gate, 0…1.
        noise_floor: Total variation below which the two merely differ.
        separation: How far the difference stands out of the noise; 1 is not at all.
        falls: The tokens that become rarer, the largest loss first.
        rises: The tokens that become more frequent, the largest gain first.
        shifts: What gives way to what, the largest sum of total variation first.
    """

    rows: int
    tokens: int
    variation: float
    gate: float | None
    share: float
    noise_floor: float
    separation: float
    falls: tuple[TokenChange, ...]
    rises: tuple[TokenChange, ...]
    shifts: tuple[Shift, ...]

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)


@torch.no_grad()
def measure_difference(
    pair: ModelPair,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    chunk_size: int = 256,
    shown: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Measure where a pair differs on responses that are given.

    Both models read every row once. Logits exist for one chunk of tokens at a time.

    Args:
        pair: The two models.
        rows: Prompts and responses, as `flexalign.data.split_tokens` yields them.
        batch_size: Rows read together.
        chunk_size: Tokens whose logits exist together.
        shown: How many tokens and shifts are kept of each kind.
        progress: Called after each batch with (rows done, rows in all).

    Raises:
        DataError: If the rows have no response tokens.
    """
    if not any(response for _, response in rows):
        raise DataError("the traces have no response tokens to compare the two models on.")
    masses = torch.zeros(2, pair.vocab_size, dtype=torch.float64)
    device = next(pair.reference.parameters()).device
    with evaluating(pair.reference), evaluating(pair.aligned):
        chunks = read_logits(
            lambda **inputs: [pair.hidden(side, **inputs) for side in ("reference", "aligned")],
            pair.heads,
            rows,
            device=device,
            batch_size=batch_size,
            chunk_size=chunk_size,
            progress=progress,
        )
        parts = [_look(*chunk, masses) for chunk in chunks]
    table = dict(zip(_COLUMNS, np.concatenate(parts, axis=1), strict=True))
    gate, noise, separation = propose_gate(table["variation"])
    above = table["variation"] > (NO_DIFFERENCE if gate is None else gate)
    return Difference(
        rows=len(rows),
        tokens=len(above),
        variation=float(table["variation"].mean()),
        gate=gate,
        share=float(above.mean()),
        noise_floor=noise,
        separation=separation,
        falls=_changes(masses, len(above), pair.tokenizer, shown, sign=-1),
        rises=_changes(masses, len(above), pair.tokenizer, shown, sign=1),
        shifts=_shifts({key: column[above] for key, column in table.items()}, rows, pair, shown),
    )


def _look(reference: Tensor, aligned: Tensor, where: Tensor, masses: Tensor) -> NDArray[np.float64]:
    """Return the columns for a chunk of positions, and add its probabilities to the sums."""
    variation = total_variation(reference, aligned)
    before, after = reference.float().softmax(-1), aligned.float().softmax(-1)
    masses[0] += before.sum(0, dtype=torch.float64)
    masses[1] += after.sum(0, dtype=torch.float64)
    change = after - before
    falls, rises = change.argmin(-1, keepdim=True), change.argmax(-1, keepdim=True)
    columns = [
        *where,
        variation,
        falls[:, 0],
        rises[:, 0],
        *(model.gather(-1, token)[:, 0] for token in (falls, rises) for model in (before, after)),
    ]
    return torch.stack([column.double() for column in columns]).numpy()


def _changes(
    masses: Tensor, tokens: int, tokenizer: PreTrainedTokenizerBase, shown: int, *, sign: int
) -> tuple[TokenChange, ...]:
    change = (masses[1] - masses[0]) * sign
    chosen = [int(token) for token in change.topk(min(shown, len(change))).indices]
    per_thousand = masses * 1000 / tokens
    return tuple(
        TokenChange(
            token=_text(tokenizer, [token]),
            reference=float(per_thousand[0, token]),
            aligned=float(per_thousand[1, token]),
            log_change=float((masses[1, token] / masses[0, token]).log()),
        )
        for token in chosen
        if change[token] > 0
    )


def _shifts(
    table: dict[str, NDArray[np.float64]], rows: Sequence[Row], pair: ModelPair, shown: int
) -> tuple[Shift, ...]:
    """Group positions by what gives way to what."""
    code = table["falls"] * pair.vocab_size + table["rises"]
    _, group = np.unique(code, return_inverse=True)
    sums = np.bincount(group, weights=table["variation"])
    found = []
    for index in np.argsort(-sums)[:shown]:
        members = {key: column[group == index] for key, column in table.items()}
        worst = int(members["variation"].argmax())
        row, position = (int(members[key][worst]) for key in ("row", "position"))
        before = (rows[row][0] + rows[row][1])[max(0, position - _CONTEXT_TOKENS) : position]
        found.append(
            Shift(
                falls=_text(pair.tokenizer, [int(members["falls"][0])]),
                rises=_text(pair.tokenizer, [int(members["rises"][0])]),
                positions=len(members["row"]),
                context=_text(pair.tokenizer, before),
                **{key: float(members[key].mean()) for key in ("variation", *_COLUMNS[5:])},
            )
        )
    return tuple(found)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
