"""The positions at which two models differ on given responses, and by how much.

At every response token both models have a distribution of the next token. The total variation (TV)
of the two distributions measures how much the models differ there. The token that loses the most
probability and the token that gains the most show the kind of difference. Positions with the same
two tokens are one *shift*, such as "`again` gives way to `;`".

λ scales all differences. Outside [0, 1] it also amplifies noise: the small differences at the other
positions. :func:`propose_gate` proposes a gate between noise and difference.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flexalign._modes import evaluating
from flexalign.analysis.deeper import DeeperThinking, ScoredTokens, think_deeper
from flexalign.data.formats import load_traces
from flexalign.data.rendering import Rendering, bind_as_sampled, split_tokens
from flexalign.data.tools import tools_of
from flexalign.errors import ConfigError, DataError
from flexalign.fusion import total_variation
from flexalign.heads import Head
from flexalign.inra import InRaModel
from flexalign.models.adapters import inner_model
from flexalign.models.compatibility import shared_width, vocabulary_size
from flexalign.models.pair import SIDES, ModelPair
from flexalign.models.prompted import PairRendering, without_system

TokenizedRow: TypeAlias = tuple[list[int], list[int]] | tuple[list[int], list[int], list[int]]
"""Token ids of a prompt and of its response; under two prompts, also of the aligned prompt."""

NO_DIFFERENCE = 1e-4
"""Total variations below this value are replaced by it. They have no effect at any λ in use."""

_TAIL = 0.01
"""The share of a group's total variation that lies beyond the quantile which bounds the group."""

_CONTEXT_TOKENS = 12
_PROBABILITIES = ("falls_reference", "falls_aligned", "rises_reference", "rises_aligned")
_COLUMNS = ("row", "position", "score", "variation", "falls", "rises", *_PROBABILITIES)


def load_rows(
    traces: str | Path, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[TokenizedRow]:
    """Read traces as token ids, rendered as they were sampled.

    Args:
        traces: A file or a saved data set, as `flexalign.data.load_traces` takes it.
        tokenizer: Of the two models; its template takes the arguments that the traces name.
        limit: Take only the first rows, this many.

    Raises:
        ConfigError: If the template does not take the arguments that they name.
        DataError: If they cannot be read.
    """
    rows = load_traces(traces, places=True)
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    bind_as_sampled(tokenizer, rows)
    return list(split_tokens(rows, tokenizer))


def load_prompted_rows(
    traces: str | Path, rendering: PairRendering, limit: int | None = None
) -> list[TokenizedRow]:
    """Read traces as token ids under both prompts of one model.

    A row's response is fitted to the reference's prompt; the same tokens follow the aligned one.

    Args:
        traces: As in :func:`load_rows`.
        rendering: The two prompts.
        limit: Take only the first rows, this many.

    Raises:
        DataError: If they cannot be read, or a prompt cannot be rendered.
    """
    rows = load_traces(traces, places=True)
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    own = Rendering(rendering.tokenizers["reference"])

    found: list[TokenizedRow] = []
    for number, row in enumerate(rows, start=1):
        # Rows that were sampled under two prompts have the reference's system message.
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = without_system(rendering.prompts.reference, prompt)
        aligned = rendering.both(prompt, tools=tools_of(row)).aligned
        asked = rendering.messages("reference", prompt)
        rendered = own.row({**row, "prompt": asked}, number)
        found.append((rendered.prompt.ids, rendered.response_ids, aligned.ids))
    return found


def one_model_pair(model: Any, tokenizer: PreTrainedTokenizerBase) -> ModelPair:
    """Return one model as both sides of a pair, for rows under two prompts."""
    width = int(inner_model(model).get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    vocab_size, _ = shared_width(width, width, vocabulary_size(tokenizer))
    return ModelPair(model, model, tokenizer, vocab_size)


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
        falls: The token that loses the most probability.
        rises: The token that gains the most probability.
        positions: Number of positions.
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
    """How two models, or the two streams of one, differ on given responses.

    Attributes:
        rows: Number of responses.
        tokens: Number of their tokens.
        variation: Mean total variation per token.
        gate: The proposed gate τ; None if no total variation is above 0.0001.
        share: Share of the tokens above the gate, 0…1.
        noise_floor: The upper bound of the total variation of noise.
        separation: The ratio between the lower bound of real differences and the noise floor. 1 is
            no separation.
        falls: The tokens that become rarer, the largest loss first.
        rises: The tokens that become more frequent, the largest gain first.
        shifts: The shifts, the largest sum of total variation first.
        deeper: What λ < 0 changes, if the reference sampled the responses; None if the models do
            not differ, or all responses are to one question.
        available: Number of responses in the file that these are the first of; None if not known.
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
    deeper: DeeperThinking | None
    available: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name."""
        return asdict(self) | {"deeper": None if self.deeper is None else self.deeper.to_json()}


@torch.no_grad()
def measure_difference(
    system: ModelPair | InRaModel,
    rows: Sequence[TokenizedRow],
    *,
    batch_size: int = 16,
    chunk_size: int = 256,
    shown: int = 10,
    right: Sequence[bool] | None = None,
    available: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Measure how a pair differs on given responses.

    Both models score every row once. Logits exist for one chunk of tokens at a time.

    Args:
        system: Two models, or one model with the two streams of its adapter.
        rows: Prompts and responses, as `flexalign.data.split_tokens` or
            :func:`load_prompted_rows` returns them.
        batch_size: Rows scored together.
        chunk_size: Tokens whose logits exist at one time.
        shown: Maximal number of falling tokens, of rising tokens, and of shifts.
        right: Whether the answer of each response is right; None if that is not known.
        available: Number of responses in the file that the rows are the first of, if known.
        progress: Called after each batch with (rows done, rows in all).

    Raises:
        ConfigError: If the tokenizer of an adapter's base is not known.
        DataError: If the rows have no response tokens.
    """
    if not any(row[1] for row in rows):
        raise DataError("the traces have no response tokens to compare the two models on.")

    if not isinstance(system, InRaModel):
        pair = system
    elif system.tokenizer is None:
        raise ConfigError(
            "the adapter's base was given as a module, and its tokenizer is not known; load it by name."
        )
    else:
        pair = one_model_pair(system.base, system.tokenizer)

    # Per model, the sum of the probabilities of each token over all positions.
    masses = torch.zeros(2, pair.vocab_size, dtype=torch.float64)
    with scoring(system) as (hidden, _, device):
        chunks = score_responses(
            hidden,
            pair.heads,
            rows,
            device=device,
            batch_size=batch_size,
            chunk_size=chunk_size,
            progress=progress,
        )
        parts = [_compare(*chunk, rows, masses) for chunk in chunks]

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
        deeper=_deeper(table, above, rows, pair, right, available),
        available=available,
    )


def _compare(
    reference: Tensor,
    aligned: Tensor,
    where: Tensor,
    rows: Sequence[TokenizedRow],
    masses: Tensor,
) -> NDArray[np.float64]:
    """Compare both models' logits, (N, V), at a chunk of positions.

    Args:
        reference: The reference's logits.
        aligned: The aligned model's logits.
        where: Row and position of the tokens that they predict, (2, N).
        rows: All rows.
        masses: Sums of the probabilities of each token, (2, V). Those of the chunk are added.

    Returns:
        The columns of `_COLUMNS`, (10, N).
    """
    variation = total_variation(reference, aligned)
    before, after = reference.float().softmax(-1), aligned.float().softmax(-1)
    masses[0] += before.sum(0, dtype=torch.float64)
    masses[1] += after.sum(0, dtype=torch.float64)

    change = after - before
    falls, rises = change.argmin(-1, keepdim=True), change.argmax(-1, keepdim=True)
    columns = [
        *where,
        _scores(reference, aligned, where, rows),
        variation,
        falls[:, 0],
        rises[:, 0],
        *(model.gather(-1, token)[:, 0] for token in (falls, rises) for model in (before, after)),
    ]
    return torch.stack([column.double() for column in columns]).numpy()


def _scores(
    reference: Tensor, aligned: Tensor, where: Tensor, rows: Sequence[TokenizedRow]
) -> Tensor:
    """Return the score of each token (see `flexalign.analysis.deeper`), (N,); as `_compare`."""
    before, after = reference.float().log_softmax(-1), aligned.float().log_softmax(-1)
    mass = before.exp()
    # A token of no probability adds nothing, whatever the ratio.
    ratio = (after - before).where(mass > 0, 0.0)
    written = torch.tensor([_token(rows[row], position) for row, position in where.T.tolist()])
    return ratio.gather(-1, written[:, None])[:, 0] - (mass * ratio).sum(-1)


def _token(row: TokenizedRow, position: int) -> int:
    """Return the token at a position of a prompt and its response."""
    start = len(row[0])
    return row[0][position] if position < start else row[1][position - start]


def _deeper(
    table: dict[str, NDArray[np.float64]],
    above: NDArray[np.bool_],
    rows: Sequence[TokenizedRow],
    pair: ModelPair,
    right: Sequence[bool] | None,
    available: int | None,
) -> DeeperThinking | None:
    """Return what λ < 0 changes; arguments as in `measure_difference` and `_shifts`."""
    row = table["row"].astype(np.int64)
    ends = np.array([len(one[0]) + len(one[1]) for one in rows])
    code = table["falls"] * pair.vocab_size + table["rises"]
    codes, group = np.unique(code, return_inverse=True)

    def name(shift: int) -> tuple[str, str]:
        falls, rises = divmod(int(codes[shift]), pair.vocab_size)
        return _text(pair.tokenizer, [falls]), _text(pair.tokenizer, [rises])

    return think_deeper(
        ScoredTokens(
            row=row,
            left=ends[row] - table["position"].astype(np.int64),
            score=table["score"],
            variation=table["variation"],
            shift=np.where(above, group, -1),
        ),
        [len(one[1]) for one in rows],
        [tuple(one[0]) for one in rows],
        name,
        right,
        available,
    )


def _changes(
    masses: Tensor, tokens: int, tokenizer: PreTrainedTokenizerBase, shown: int, *, sign: int
) -> tuple[TokenChange, ...]:
    """Return the tokens whose probability changes most, in the direction of ``sign``."""
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
    table: dict[str, NDArray[np.float64]], rows: Sequence[TokenizedRow], pair: ModelPair, shown: int
) -> tuple[Shift, ...]:
    """Group positions by their two tokens; return the groups with the most total variation."""
    # One number for each pair of tokens.
    code = table["falls"] * pair.vocab_size + table["rises"]
    _, group = np.unique(code, return_inverse=True)
    sums = np.bincount(group, weights=table["variation"])

    found = []
    for index in np.argsort(-sums)[:shown]:
        members = {key: column[group == index] for key, column in table.items()}

        # The text before the position where the two differ most.
        worst = int(members["variation"].argmax())
        row, position = (int(members[key][worst]) for key in ("row", "position"))
        before = (rows[row][0] + rows[row][1])[max(0, position - _CONTEXT_TOKENS) : position]

        found.append(
            Shift(
                falls=_text(pair.tokenizer, [int(members["falls"][0])]),
                rises=_text(pair.tokenizer, [int(members["rises"][0])]),
                positions=len(members["row"]),
                context=_text(pair.tokenizer, before),
                **{key: float(members[key].mean()) for key in ("variation", *_PROBABILITIES)},
            )
        )
    return tuple(found)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _right_padded(tokens: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    longest = max(map(len, tokens))
    padded = [row + [row[-1]] * (longest - len(row)) for row in tokens]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in tokens]
    return {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def propose_gate(variations: NDArray[np.float64]) -> tuple[float | None, float, float]:
    """Propose a gate between noise and difference, from total variations (TVs).

    The TVs are split, on a logarithmic scale and each position weighted by its TV, into the two
    groups that explain most of their variance (Otsu's threshold). The noise floor n is the weighted
    99 % quantile of the lower group, and s the weighted 1 % quantile of the upper one. The gate is
    √(s·n), half-way between them on the logarithmic scale. s/n is the *separation*. If it is near
    1, there is no gap between the two groups.

    Args:
        variations: One TV for each position.

    Returns:
        The gate (None if no TV is above 0.0001), the noise floor and the separation.
    """
    weights = np.sort(variations).clip(NO_DIFFERENCE)
    if not len(weights) or weights[-1] == NO_DIFFERENCE:
        return None, 0.0, 1.0

    # Otsu: the split with the largest variance between its two groups.
    logs = np.log(weights)
    below, total = np.cumsum(weights)[:-1], weights.sum()
    moments = np.cumsum(weights * logs)[:-1]
    mean = (weights * logs).sum() / total
    between = (moments - mean * below) ** 2 / (below * (total - below))
    split = int(between.argmax()) + 1 if len(between) else 0

    signal = _weighted_quantile(weights[split:], _TAIL)
    noise = _weighted_quantile(weights[:split], 1 - _TAIL) if split else signal
    return float(np.sqrt(signal * noise)), noise, signal / noise


def _weighted_quantile(ordered: NDArray[np.float64], share: float) -> float:
    """Return the value below which this share of the sum of all values lies."""
    sums = np.cumsum(ordered)
    return float(ordered[int(np.searchsorted(sums, share * sums[-1]))])


def _pair_hidden(pair: ModelPair) -> Callable[..., list[Tensor]]:
    """Return a function that returns both sides' final hidden states.

    It takes the reference's inputs, and as ``aligned`` those of the aligned side if they differ.
    """

    def hidden(aligned: dict[str, Tensor] | None = None, **inputs: Tensor) -> list[Tensor]:
        own = {"reference": inputs, "aligned": inputs if aligned is None else aligned}
        return [pair.hidden(side, **own[side]) for side in SIDES]

    return hidden


@contextmanager
def scoring(
    system: ModelPair | InRaModel,
) -> Iterator[tuple[Callable[..., Sequence[Tensor]], Sequence[Head], torch.device]]:
    """Yield a function that returns both models' hidden states, their heads and their device.

    Args:
        system: Two models, or one model with the two streams of its adapter.
    """
    if isinstance(system, InRaModel):
        with evaluating(system):
            yield system.stream_hidden, (system.head, system.head), system.device
        return

    pair = system
    with evaluating(pair.reference), evaluating(pair.aligned):
        yield _pair_hidden(pair), pair.heads, next(pair.reference.parameters()).device


def score_responses(
    hidden: Callable[..., Sequence[Tensor]],
    heads: Sequence[Head],
    rows: Sequence[TokenizedRow],
    *,
    device: torch.device,
    batch_size: int,
    chunk_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield both models' logits, (N, V) each, and (row, position) of the tokens they predict.

    The longest rows come first, so that a lack of memory shows in the first batch.

    Args:
        hidden: Returns both models' final hidden states of ``input_ids`` and ``attention_mask``;
            of rows under two prompts, it gets those of the aligned side as ``aligned``.
        heads: Both models' heads.
        rows: Prompts and responses. The tokens of the responses are predicted.
        device: The models' device.
        batch_size: Rows scored together.
        chunk_size: The maximal N.
        progress: Called after each batch with (rows done, rows in all).
    """
    order = sorted(range(len(rows)), key=lambda index: -sum(map(len, rows[index][:2])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        yield from _score_batch(hidden, heads, rows, batch, device, chunk_size)
        if progress is not None:
            progress(start + len(batch), len(order))


def _score_batch(
    hidden: Callable[..., Sequence[Tensor]],
    heads: Sequence[Head],
    rows: Sequence[TokenizedRow],
    batch: Sequence[int],
    device: torch.device,
    chunk_size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Score some of the rows together. Their logits exist for one chunk at a time."""
    tokens = [rows[index][0] + rows[index][1] for index in batch]
    inputs = _right_padded(tokens, device)

    # The hidden state before a token predicts it. Nothing predicts the first token of a row.
    places = [
        (line, position - 1)
        for line, (index, row) in enumerate(zip(batch, tokens, strict=True))
        for position in range(max(len(rows[index][0]), 1), len(row))
    ]

    # Under two prompts the same response stands later, or earlier, on the aligned side.
    second = [(*row, row[0])[2] for row in (rows[index] for index in batch)]
    if any(len(rows[index]) == 3 for index in batch):
        own_tokens = [prompt + rows[index][1] for prompt, index in zip(second, batch, strict=True)]
        states = hidden(aligned=_right_padded(own_tokens, device), **inputs)
    else:
        states = hidden(**inputs)
    shifts = torch.tensor(
        [len(prompt) - len(rows[index][0]) for prompt, index in zip(second, batch, strict=True)]
    )

    for start in range(0, len(places), chunk_size):
        here = torch.tensor(places[start : start + chunk_size])
        there = here[:, 1] + shifts[here[:, 0]]
        logits = [
            head(own[here[:, 0], columns]).cpu()
            for head, own, columns in zip(heads, states, (here[:, 1], there), strict=True)
        ]
        where = torch.stack([torch.tensor(batch)[here[:, 0]], here[:, 1] + 1])
        yield logits[0], logits[1], where
