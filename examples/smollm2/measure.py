"""What is measured on the answers: length, repetition, and what the reference thinks of them."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from flexalign.data.length import split_tokens
from flexalign.evaluation.statistics import clustered_interval, paired_difference_interval
from flexalign.heads import Head, last_hidden

OPENING_WORDS = 40

Row = dict[str, Any]


def measure(answers: Sequence[Row], reference: Any, tokenizer: Any) -> Row:
    """Measure one system's answers; `reference` is the model of λ=0.

    `answers` are rows of ``flexalign sample``, one per prompt.
    """
    prompts = [row["prompt_index"] for row in answers]
    tokens = [row["tokens"] for row in answers]
    texts = [row["completion"][-1]["content"] for row in answers]
    return {
        "answers": len(answers),
        "tokens": clustered_interval(tokens, prompts, share=False)._asdict(),
        "truncated": clustered_interval(
            [float(row["truncated"]) for row in answers], prompts, share=True
        )._asdict(),
        "distinct_2": distinct_2(texts),
        "distinct_2_opening": distinct_2(texts, OPENING_WORDS),
        "perplexity": perplexity(answers, reference, tokenizer),
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
        words: Words of each answer that count, the first ones; None for all. Longer text repeats
            itself more, so whole answers of different lengths do not compare.
    """
    pairs = [pair for text in texts for pair in pairwise(re.findall(r"\w+", text.lower())[:words])]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


@torch.no_grad()
def perplexity(answers: Sequence[Row], model: Any, tokenizer: Any) -> float:
    """exp of the mean negative log-likelihood, nats per token, of all answers under a model.

    The token that ends an answer is left out: what counts is the text, not that it stops. Empty
    answers have no tokens.
    """
    head = Head.of(model)
    nats, count = 0.0, 0
    rows = Dataset.from_list(
        [{name: row[name] for name in ("prompt", "completion")} for row in answers]
    )
    for row, (prompt, response) in zip(answers, split_tokens(rows, tokenizer), strict=True):
        ids = torch.tensor([prompt + response[: row["tokens"]]])
        if ids.shape[1] == len(prompt):
            continue
        hidden = last_hidden(model, input_ids=ids)[0, len(prompt) - 1 : -1]
        targets = ids[0, len(prompt) :]
        nats += float(torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum"))
        count += len(targets)
    return math.exp(nats / count)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw mean tokens and perplexity against λ.

    Args:
        rows: Each with ``system``, ``lambda``, ``tokens`` and ``perplexity``.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = {
        "the pair": [row for row in rows if row["system"] in ("reference", "aligned")],
        "TrRa students": [row for row in rows if row["system"] == "trra"],
    }
    for (label, group), style in zip(groups.items(), ("s", "o-"), strict=True):
        lams = [row["lambda"] for row in group]
        means = [row["tokens"]["mean"] for row in group]
        reach = [
            [row["tokens"]["mean"] - row["tokens"]["low"] for row in group],
            [row["tokens"]["high"] - row["tokens"]["mean"] for row in group],
        ]
        left.errorbar(lams, means, reach, fmt=style, capsize=3, label=label)
        right.plot(lams, [row["perplexity"] for row in group], style, label=label)
    left.set_title("mean tokens an answer, 95 %", fontsize=10)
    right.set_title("perplexity under the reference", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("λ")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)
