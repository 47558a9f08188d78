"""Documents: the units of a cache, and their keys.

A document is one sequence as a teacher sees it: a row, or one of the rows that packing joined. Its
key is a hash of its tokens and of the positions that count. So it is found in any order and any
packing of the data, also if TRL's preparation left out other rows. Under two prompts a document has the
aligned side's sequence too.
"""

import copy
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTTrainer

from flexalign.models.pair import SIDES
from flexalign.training.pair_rows import ALIGNED_PROMPT, PairRows
from flexalign.training.rows import RenderedRows

KEY_BYTES = 16
_IGNORED = -100


@dataclass(frozen=True)
class Document:
    """A sequence of tokens with the positions whose next token is trained on.

    Attributes:
        tokens: Token ids, shape ``(T,)``.
        positions: Positions whose next token is trained on, ascending, shape ``(N,)``, each below
            T − 1.
        aligned: The same response after the aligned side's prompt; None if both sides see the same.
    """

    tokens: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    aligned: "Document | None" = None

    @classmethod
    def of(cls, tokens: Sequence[int], labels: Sequence[int]) -> "Document":
        """Make a document of the columns ``input_ids`` and ``labels`` of a row."""
        counted = np.asarray(labels[1:]) != _IGNORED
        return cls(np.asarray(tokens, dtype=np.int64), np.flatnonzero(counted))

    def under(self, prompt: Sequence[int]) -> "Document":
        """Return the document with the aligned side's sequence: another prompt, the same response."""
        if not len(self.positions):
            return self
        begins = int(self.positions[0]) + 1
        tokens = np.concatenate([np.asarray(prompt, dtype=np.int64), self.tokens[begins:]])
        moved = self.positions - begins + len(prompt)
        return Document(self.tokens, self.positions, Document(tokens, moved))

    def of_side(self, side: str) -> "Document":
        """Return the document that a side's teacher sees."""
        return self.aligned if side == "aligned" and self.aligned is not None else self

    @property
    def longest(self) -> int:
        """Tokens of the longer side."""
        return max(len(self.of_side(side).tokens) for side in SIDES)

    @property
    def key(self) -> bytes:
        """A hash of `KEY_BYTES` bytes, equal for equal documents on every machine."""
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        other = () if self.aligned is None else (self.aligned.tokens, self.aligned.positions)
        for part in (self.tokens, self.positions, *other):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.astype("<i8").tobytes())
        return digest.digest()


def documents_of(row: Mapping[str, Any]) -> Iterator[Document]:
    """Split a prepared row into its documents: those that packing joined, or the row itself."""
    tokens, labels = row["input_ids"], row["labels"]
    if ALIGNED_PROMPT in row:
        yield Document.of(tokens, labels).under(row[ALIGNED_PROMPT])
        return
    start = 0
    for length in row.get("seq_lengths") or [len(tokens)]:
        stop = start + length
        yield Document.of(tokens[start:stop], labels[start:stop])
        start = stop


class _Preparation(RenderedRows, SFTTrainer):  # type: ignore[misc]
    """A trainer that prepares a data set, and never trains."""


def prepare_documents(
    traces: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    pair_rows: PairRows | None = None,
) -> list[Document]:
    """Prepare a data set as the trainer does, but unpacked; return documents with counted tokens.

    TRL's trainer does the preparation, with a tiny model that is not used.

    Args:
        traces: The training data, as the trainer takes it.
        tokenizer: The pair's tokenizer.
        args: The run's ``TrRaConfig``.
        pair_rows: Renders the data under two prompts, if the sides have prompts of their own.

    Returns:
        Each distinct document that has a counted token once, in the order of the data.
    """
    plain = copy.copy(args)
    if args.packing:
        plain.truncation_mode = "keep_start"  # as packing truncates documents that are too long
    plain.packing = plain.padding_free = plain.shuffle_dataset = False
    plain.eval_packing = None

    # TRL prepares rows only in a trainer, which needs a model, so this one is as small as possible.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )

    with tempfile.TemporaryDirectory() as folder:
        plain.output_dir = folder
        trainer = _Preparation(
            model=LlamaForCausalLM(config),
            args=plain,
            train_dataset=traces,
            processing_class=tokenizer,
            pair_rows=pair_rows,
        )
    return list(_distinct(trainer.train_dataset))


def _distinct(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    seen = set()
    for row in rows:
        for document in documents_of(row):
            if len(document.positions) and document.key not in seen:
                seen.add(document.key)
                yield document
