"""The effect of λ on the next token, measured on given traces without sampling.

Both models score every trace once. For each λ and each response token two quantities are measured:
the divergence between the teacher of equation 5 and the reference, and whether the teacher's
likeliest token is among the likeliest tokens of neither model. The first grows with λ from the
start. The second shows extrapolated noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexalign._storage import write_json
from flexalign.analysis.difference import (
    TokenizedRow,
    load_prompted_rows,
    load_rows,
    one_model_pair,
    score_responses,
    scoring,
)
from flexalign.errors import ConfigError, DataError
from flexalign.fusion import as_lambda, fuse
from flexalign.inra import InRaModel
from flexalign.lora_dial import LoRADialConfig
from flexalign.models.compatibility import examine_pair
from flexalign.models.pair import ModelPair
from flexalign.models.prompted import PromptPair
from flexalign.systems import LocalBackend, System, SystemOptions
from flexalign.systems.local import TwoPromptText

PREVIEW_LAMBDAS = tuple(round(0.2 * step, 1) for step in range(1, 51))
"""0.2 to 10 in steps of 0.2."""

LEAVING_SHARE = 0.001
"""The share of tokens outside both models' top k from which a λ counts as having left them."""


@dataclass(frozen=True)
class PreviewRow:
    """The teacher at one λ. All values but λ are means over response tokens.

    Attributes:
        lam: λ.
        divergence: KL(teacher ‖ reference), nats per token.
        outside: Share of tokens at which its likeliest token is in neither model's top k.
        mass_outside: Its probability of the tokens that are in neither model's top k.
    """

    lam: float
    divergence: float
    outside: float
    mass_outside: float


@dataclass(frozen=True)
class Preview:
    """The teacher at every requested λ.

    Attributes:
        tokens: Number of scored response tokens.
        top_k: k.
        leaves_at: The smallest requested λ above 1 at which the teacher's likeliest token is in
            neither model's top k for at least one token in a thousand; None if there is none.
        rows: One for each λ, ascending.
    """

    tokens: int
    top_k: int
    leaves_at: float | None
    rows: tuple[PreviewRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name."""
        rows = [asdict(row) for row in self.rows]
        return asdict(self) | {"rows": [{"lambda": row.pop("lam"), **row} for row in rows]}


def open_preview(
    system: System,
    traces: str | Path,
    prompts: PromptPair | None = None,
    *,
    limit: int | None = None,
    by_id: bool = False,
) -> tuple[ModelPair | InRaModel, list[TokenizedRow]]:
    """Read traces and load the system that is previewed on them: what :func:`preview` takes.

    Args:
        system: A pair, a dial, or one model under two prompts.
        traces: A file or a saved data set, as `flexalign.data.load_traces` takes it.
        prompts: The two prompts of ``prompts:MODEL``.
        limit: Take only the first rows, this many.
        by_id: Take special tokens of a pair for the same where only their names differ.

    Raises:
        CheckpointError: If weights are missing or damaged.
        ConfigError: If the system has no two models or streams, or a part of it is not there.
        DataError: If the traces cannot be read.
        PairMismatchError: If its parts do not fit together.
    """
    if system.kind not in ("pair", "dial", "prompts"):
        raise ConfigError(
            f"{system.name} has no two models or streams; give pair:, prompts: or dial:."
        )
    if prompts is not None and system.kind != "prompts":
        raise ConfigError(
            "--reference-prompt and --aligned-prompt are about a system prompts:MODEL; name one."
        )
    backend = LocalBackend(system, options=SystemOptions(prompts=prompts, by_id=by_id))
    if isinstance(backend.text, TwoPromptText):
        prompted = load_prompted_rows(traces, backend.text.rendering, limit)
        decoder = backend.load(device_map=None)
        return one_model_pair(decoder.base, backend.text.tokenizer), prompted
    if isinstance(backend.config, LoRADialConfig):
        raise ConfigError(
            f"{system.name} is a LoRA dial: one stream, which holds no two distributions to mix; "
            "preview the pair that it was trained on."
        )
    is_pair = system.kind == "pair"
    tokenizer = (
        examine_pair(*system.parts, by_id=by_id).tokenizer if is_pair else backend.text.tokenizer
    )
    rows = load_rows(traces, tokenizer, limit)  # what is wrong with them is said before any load

    model: Any = backend.load(device_map=None)
    return (model.pair if is_pair else model), rows


@torch.no_grad()
def preview(
    system: ModelPair | InRaModel,
    rows: Sequence[TokenizedRow],
    *,
    lams: Sequence[float] = PREVIEW_LAMBDAS,
    top_k: int = 5,
    batch_size: int = 8,
    chunk_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Preview:
    """Score traces once, and measure the teacher at every λ.

    Args:
        system: Two models, or one model with the two streams of its adapter.
        rows: Prompts and responses, as `flexalign.data.split_tokens` yields them.
        lams: The λ, in any order.
        top_k: k, the number of each model's likeliest tokens that count as its own.
        batch_size: Rows scored together.
        chunk_size: Tokens whose logits exist at one time.
        progress: Called after each batch with (rows done, rows in all).

    Raises:
        ConfigError: If there is no λ, or k is not between 1 and the vocabulary's size.
        DataError: If the rows have no response tokens.
        LambdaError: If a λ is not finite.
    """
    if not any(row[1] for row in rows):
        raise DataError("the traces have no response tokens to look at.")

    ordered = sorted({float(as_lambda(lam)) for lam in lams})
    if not ordered:
        raise ConfigError("a preview needs at least one λ.")

    sums, count = torch.zeros(len(ordered), 3, dtype=torch.float64), 0
    with scoring(system) as (hidden, heads, device):
        for reference, aligned, _ in score_responses(
            hidden,
            heads,
            rows,
            device=device,
            batch_size=batch_size,
            chunk_size=chunk_size,
            progress=progress,
        ):
            if not 1 <= top_k < reference.shape[-1]:
                raise ConfigError(
                    f"top_k must be at least 1 and less than the vocabulary of "
                    f"{reference.shape[-1]} tokens, got {top_k}."
                )

            own = _likeliest(reference, top_k) | _likeliest(aligned, top_k)
            before = reference.float().log_softmax(-1)
            for place, lam in enumerate(ordered):
                sums[place] += _sums(fuse(reference, aligned, lam), before, own)
            count += len(reference)

    table = (sums / count).tolist()
    found = tuple(PreviewRow(lam, *means) for lam, means in zip(ordered, table, strict=True))
    left = [row.lam for row in found if row.lam > 1 and row.outside >= LEAVING_SHARE]
    return Preview(count, top_k, left[0] if left else None, found)


def write_preview(found: Preview, folder: Path) -> None:
    """Write ``preview.json`` and ``preview.png`` into a folder, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "preview.json", found.to_json())
    _draw(found, folder / "preview.png")


def _draw(found: Preview, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot()
    lams = [row.lam for row in found.rows]
    left.plot(lams, [row.divergence for row in found.rows], color="C0")
    left.set_xlabel("λ")
    left.set_ylabel("KL(teacher ‖ reference), nats per token", color="C0")
    right = left.twinx()
    right.plot(lams, [100 * row.outside for row in found.rows], color="C3")
    right.set_ylabel(f"top choice outside both top {found.top_k}, %", color="C3")
    figure.savefig(path, dpi=150)


def _likeliest(logits: Tensor, k: int) -> Tensor:
    """Return a mask of the k likeliest tokens of each position, (N, V)."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k).indices, True)


def _sums(teacher: Tensor, before: Tensor, own: Tensor) -> Tensor:
    """Return divergence, top choices outside and mass outside, summed over the positions, (3,).

    Args:
        teacher: The teacher's logits, (N, V).
        before: The reference's log-probabilities, (N, V).
        own: A mask of the tokens that are in either model's top k, (N, V).
    """
    after = teacher.float().log_softmax(-1)
    mass = after.exp()
    # Where the mass is 0, the difference may be −inf, and its product with the mass NaN.
    divergence = (mass * (after - before)).where(mass > 0, 0.0).sum(-1)
    chosen = own.gather(-1, after.argmax(-1, keepdim=True))[:, 0]
    outside = mass.masked_fill(own, 0.0).sum(-1)
    return torch.stack([column.double().sum() for column in (divergence, ~chosen, outside)])
