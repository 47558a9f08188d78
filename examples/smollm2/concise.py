"""Concise answers out of long ones, and prompts that nobody trains on."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexalign.data import load_traces

MAX_WORDS = 40
MAX_SENTENCES = 2

Row = dict[str, Any]

# Three letters before the stop, so that "Dr. Smith", "e.g. this" and "1. that" are not cut.
_SENTENCE_END = re.compile(r"(?<=\w{3}[.!?])\s+(?=\S)")
_STOPS = (".", "!", "?", '"', "”")
_LIST_OR_CODE = re.compile(r"[-*•#>|`]|\(?\d+[.):]")


def shorten(answer: str) -> str | None:
    """Keep the first sentences of an answer: two at most, 40 words at most.

    Sentences are kept whole and come from the first line alone. None where that makes no answer:
    the line is a list, code, a heading or an announcement (more follows, and it does not end as
    a sentence does), or its first sentence is longer than 40 words.
    """
    paragraph, _, rest = (part.strip() for part in answer.strip().partition("\n"))
    if _LIST_OR_CODE.match(paragraph) or (rest and not paragraph.endswith(_STOPS)):
        return None
    kept: list[str] = []
    for sentence in _SENTENCE_END.split(paragraph)[:MAX_SENTENCES]:
        if len(" ".join([*kept, sentence]).split()) > MAX_WORDS:
            break
        kept.append(sentence)
    return " ".join(kept) or None


@dataclass(frozen=True)
class Split:
    """One instruction file, divided by a seeded shuffle.

    Attributes:
        held_out: Prompts for the measurements; in neither of the others.
        prompts: Prompts for the traces.
        concise: Prompts with shortened answers, for the aligned model.
        pairs: The same prompts with the shortened answer as ``chosen`` and the whole one as
            ``rejected``, where anything was cut.
    """

    held_out: list[Row]
    prompts: list[Row]
    concise: list[Row]
    pairs: list[Row]


def split(data: Path, *, held_out: int, seed: int) -> Split:
    """Divide an instruction file; prompts that occur twice are used once.

    Args:
        data: A file of prompts with answers, in any form that `load_traces` reads.
        held_out: Rows set apart before anything else is decided.
        seed: Of the shuffle.
    """
    rows = list({json.dumps(row["prompt"]): row for row in load_traces(data)}.values())
    random.Random(seed).shuffle(rows)
    apart, rest = rows[:held_out], rows[held_out:]
    concise, pairs = [], []
    for row in rest:
        whole = _text(row["completion"])
        short = shorten(whole)
        if short is None:
            continue
        completion = [{"role": "assistant", "content": short}]
        concise.append({"prompt": row["prompt"], "completion": completion})
        if short != whole.strip():
            rejected = [{"role": "assistant", "content": whole}]
            pairs.append({"prompt": row["prompt"], "chosen": completion, "rejected": rejected})
    return Split(_prompts(apart), _prompts(rest), concise, pairs)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write JSON Lines, all or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    partial.replace(path)


def read_rows(path: Path) -> list[Row]:
    """Read JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _prompts(rows: list[Row]) -> list[Row]:
    return [{"prompt": row["prompt"]} for row in rows]


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
