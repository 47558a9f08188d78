"""What is measured on the answers: length, repetition, and what the reference thinks of them."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy

from flexalign.data.rendering import split_tokens
from flexalign.heads import Head, last_hidden
from flexalign.statistics import clustered_interval, paired_difference_interval

OPENING = 20
"""Words, or tokens, of an answer's opening. Longer text repeats itself more and is easier to go on
with, so that whole answers of different lengths do not compare; their openings do."""

Row = dict[str, Any]


def measure(answers: Sequence[Row], reference: Any, tokenizer: Any) -> Row:
    """Measure one system's answers; `reference` is the model of λ=0.

    `answers` are rows of ``flexalign sample``, one per prompt.
    """
    prompts = [row["prompt_index"] for row in answers]
    tokens = [row["tokens"] for row in answers]
    texts = [row["completion"][-1]["content"] for row in answers]
    nats = surprise(answers, reference, tokenizer)
    return {
        "answers": len(answers),
        "tokens": clustered_interval(tokens, prompts, share=False)._asdict(),
        "truncated": clustered_interval(
            [float(row["truncated"]) for row in answers], prompts, share=True
        )._asdict(),
        "distinct_2": distinct_2(texts),
        "distinct_2_opening": distinct_2(texts, OPENING),
        "perplexity": perplexity(nats),
        "perplexity_opening": perplexity(nats, OPENING),
    }


def difference(answers: Sequence[Row], baseline: Sequence[Row]) -> dict[str, float]:
    """Interval of the mean tokens less those of a baseline, prompt by prompt."""
    (one, one_prompts), (two, two_prompts) = (
        ([row["tokens"] for row in rows], [row["prompt_index"] for row in rows])
        for rows in (answers, baseline)
    )
    return paired_difference_interval(one, one_prompts, two, two_prompts)._asdict()


def distinct_2(texts: Sequence[str], words: int | None = None) -> float:
    """Distinct pairs of neighbouring words over all such pairs, in all texts together.

    Args:
        texts: The answers.
        words: Words of each answer that count, the first ones; None for all.
    """
    pairs = [pair for text in texts for pair in pairwise(re.findall(r"\w+", text.lower())[:words])]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


@torch.no_grad()
def surprise(answers: Sequence[Row], model: Any, tokenizer: Any) -> list[Tensor]:
    """Negative log-likelihood of each answer's tokens under a model: nats, shape (tokens,).

    The token that ends an answer is left out: what counts is the text, not that it stops.
    """
    head = Head.of(model)
    rows = Dataset.from_list(
        [{name: row[name] for name in ("prompt", "completion")} for row in answers]
    )
    nats = []
    for row, (prompt, response) in zip(answers, split_tokens(rows, tokenizer), strict=True):
        ids = torch.tensor([prompt + response[: row["tokens"]]])
        hidden = last_hidden(model, input_ids=ids)[0, len(prompt) - 1 : -1]
        nats.append(cross_entropy(head(hidden), ids[0, len(prompt) :], reduction="none"))
    return nats


def perplexity(nats: Sequence[Tensor], tokens: int | None = None) -> float:
    """exp of the mean negative log-likelihood over all answers' tokens together.

    Args:
        nats: One tensor per answer, as `surprise` returns them.
        tokens: Tokens of each answer that count, the first ones; None for all.
    """
    counted = torch.cat([part[:tokens] for part in nats])
    return math.exp(counted.double().mean()) if len(counted) else math.nan


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw mean tokens, and the perplexity of the openings, against λ.

    Args:
        rows: Each with ``system``, ``lambda``, ``tokens`` and ``perplexity_opening``.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = {
        "the pair": [row for row in rows if row["system"] in ("reference", "aligned")],
        "TrRa students": [row for row in rows if row["system"] == "trra"],
        "one LoRA dial": [row for row in rows if row["system"] == "dial"],
    }
    for (label, group), style in zip(groups.items(), ("s", "o-", "^--"), strict=True):
        lams = [row["lambda"] for row in group]
        means = [row["tokens"]["mean"] for row in group]
        reach = [
            [row["tokens"]["mean"] - row["tokens"]["low"] for row in group],
            [row["tokens"]["high"] - row["tokens"]["mean"] for row in group],
        ]
        left.errorbar(lams, means, reach, fmt=style, capsize=3, label=label)
        right.plot(lams, [row["perplexity_opening"] for row in group], style, label=label)
    left.set_title("mean tokens an answer, 95 %", fontsize=10)
    right.set_title(f"perplexity under the reference, first {OPENING} tokens", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("λ")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)
