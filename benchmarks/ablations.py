"""The paper's ablations of the layer adapter, in the miniature.

    python benchmarks/ablations.py             # about half an hour on one core
    python benchmarks/ablations.py --quick     # a few minutes, few steps
    python benchmarks/ablations.py --rewrite   # only write the last run's table again

How the adapter starts (the identity, or random weights), how many layers it has (one, two, three),
and where it stands: before layer 0, as InRa's does, or further up. Each is taught twice, with the
same steps: to answer without thinking (share of right greedy answers), and towards the aligned
model by TrRa's loss (its habits, teacher-forced). Places other than the first are made here, as a
model of one layer more: InRa has none of them.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _adapters import Logits, Variant, make, plain_logits, stream_logits, towards, walked
from torch import Tensor

from flexalign.miniature import make_questions
from flexalign.miniature.build import FAST_SCHOOLING, encode, teach
from flexalign.miniature.demo import load_pair
from flexalign.miniature.measure import branch_probabilities, mean_habits
from flexalign.miniature.tokenizer import build_tokenizer
from flexalign.statistics import clustered_interval

RAW = Path("benchmarks/results/ablations.json")
REPORT = Path("benchmarks/results/ablations.md")
SEED = 20_000
CONTEXT_TOKENS = 1024
EMPTY_THINKING = ["<think>", "</think>"]
RATES = {"fast": 1e-3, "towards": 3e-3}


VARIANTS = [
    Variant("one layer, identity (InRa)"),
    Variant("one layer, random start", is_random=True),
    Variant("two layers, identity", layers=2),
    Variant("three layers, identity", layers=3),
    Variant("one layer, before layer 1", place=1),
    Variant("one layer, before layer 2", place=2),
    Variant("one layer, after the last", place=3),
]


def run(variant: Variant, options: dict[str, Any]) -> dict[str, Any]:
    """Teach a variant both ways and measure it."""
    stream, parameters = make(variant)
    schooling = dataclasses.replace(
        FAST_SCHOOLING, steps=options["fast_steps"], learning_rate=RATES["fast"]
    )
    teach(stream, schooling, seed=0, callbacks=[])
    fast = greedy_share(stream_logits(stream), options["questions"])
    stream, parameters = make(variant)
    reference, aligned, _ = load_pair()
    towards(
        stream_logits(stream),
        parameters,
        plain_logits(reference),
        plain_logits(aligned),
        steps=options["towards_steps"],
        learning_rate=RATES["towards"],
    )
    stream.eval()
    questions = make_questions(options["judged_questions"], SEED)
    values = branch_probabilities(
        {"it": stream_logits(stream)},
        build_tokenizer(CONTEXT_TOKENS),
        questions,
        walked(questions),
    )
    return {
        "name": variant.name,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "fast": list(fast),
        "habits": dataclasses.asdict(mean_habits(values["it"])),
    }


@torch.no_grad()
def greedy_share(logits: Logits, count: int) -> Sequence[float]:
    """Share of questions whose likeliest answer after an empty thinking is right; interval."""
    tokenizer = build_tokenizer(CONTEXT_TOKENS)
    questions = make_questions(count, SEED)
    right = []
    for question in questions:
        asked, _ = encode(tokenizer, question.text, [])
        ids = torch.tensor([asked + tokenizer.convert_tokens_to_ids(EMPTY_THINKING)])
        likeliest: Tensor = logits(ids, torch.ones_like(ids))[0, -1].argmax()
        right.append(tokenizer.convert_ids_to_tokens(int(likeliest)) == str(question.answer))
    return clustered_interval(right, range(count), share=True)


def report(results: dict[str, Any]) -> str:
    """The table."""
    options = results["options"]
    lines = [
        "# Ablations of the layer adapter, in the miniature",
        "",
        f"`python benchmarks/ablations.py`: {options['fast_steps']} steps without thinking and "
        f"{options['towards_steps']} steps of TrRa's loss towards the aligned model (r = 0.550, "
        f"ε = 0.243; the reference has 0.700 and 0.348), one seed. {options['questions']} "
        "questions; brackets: 95 % intervals.",
        "",
        "| adapter | parameters | right without thinking | r | ε | c |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        low, share, high = row["fast"]
        habits = " | ".join(f"{row['habits'][h]:.3f}" for h in ("again", "error", "check"))
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {share:.3f} [{low:.3f}, {high:.3f}] "
            f"| {habits} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and questions")
    parser.add_argument("--rewrite", action="store_true", help="only write the table again")
    chosen = parser.parse_args(arguments)
    if chosen.rewrite:
        results = json.loads(RAW.read_text(encoding="utf-8"))
        REPORT.write_text(report(results), encoding="utf-8")
        return
    torch.set_num_threads(1)
    options = {
        "fast_steps": 20 if chosen.quick else FAST_SCHOOLING.steps,
        "towards_steps": 20 if chosen.quick else 150,
        "questions": 100 if chosen.quick else 2000,
        "judged_questions": 20 if chosen.quick else 200,
    }
    rows = []
    for variant in VARIANTS:
        rows.append(run(variant, options))
        print(rows[-1]["name"], "done", flush=True)
    results = {"options": options, "rows": rows}
    if chosen.quick:
        print(report(results))
        return
    RAW.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    REPORT.write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    main()
