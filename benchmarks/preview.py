"""How well a preview, which samples nothing, foretells where the miniature's accuracy breaks.

    python benchmarks/preview.py    # about a minute on one core

The preview reads traces of the reference with both models. What it warns of is held against the
accuracy of the pair's own fused probabilities (measured at every branch of the same traces and put
into the world's closed form) and of the world's own. Where students were trained at a λ, what they
scored stands beside it, from benchmarks/results/miniature.json. The report goes to
benchmarks/results/preview.md.
"""

import json
import random
from functools import lru_cache
from pathlib import Path

import torch

from flexalign.analysis.preview import PREVIEW_LAMBDAS, preview
from flexalign.fusion import fuse
from flexalign.miniature import make_questions
from flexalign.miniature.build import encode
from flexalign.miniature.closed_form import expected_outcome, token_level
from flexalign.miniature.measure import branch_probabilities, mean_habits
from flexalign.miniature.world import ALIGNED, REFERENCE, sample_trace
from flexalign.models.pair import ModelPair

REPORT = Path("benchmarks/results/preview.md")
STUDENTS = Path("benchmarks/results/miniature.json")
TRACES = 100
SHOWN = (0.2, 0.6, 1.0, 1.4, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
TOP_KS = (1, 2, 5)


def main() -> None:
    torch.manual_seed(0)
    pair = ModelPair.load("miniature")
    questions = make_questions(TRACES, 41)
    rng = random.Random(41)
    traces = [sample_trace(question, REFERENCE, rng) for question in questions]
    rows = [
        encode(pair.tokenizer, question.text, trace)
        for question, trace in zip(questions, traces, strict=True)
    ]
    previews = {k: preview(pair, rows, top_k=k) for k in TOP_KS}

    @lru_cache(maxsize=1)
    def sides(ids, attention):  # every λ is asked of one batch before the next comes
        return [
            pair.logits(side, input_ids=ids, attention_mask=attention)
            for side in ("reference", "aligned")
        ]

    teachers = {
        str(lam): lambda ids, attention, lam=lam: fuse(*sides(ids, attention), lam)
        for lam in (0.0, *PREVIEW_LAMBDAS)
    }
    forced = branch_probabilities(teachers, pair.tokenizer, questions, traces)
    own = {lam: expected_outcome(mean_habits(forced[str(lam)])) for lam in (0.0, *PREVIEW_LAMBDAS)}
    world = {
        lam: expected_outcome(token_level(REFERENCE, ALIGNED, lam))
        for lam in (0.0, *PREVIEW_LAMBDAS)
    }
    students = _students()
    lines = [
        f"`python benchmarks/preview.py`: {TRACES} traces of the reference "
        f"({previews[5].tokens} tokens), the miniature's pair. *Outside*: tokens at which the "
        "teacher's top choice is among neither model's top k; *mass*: its probability of such "
        "tokens. *Pair*: accuracy of the pair's own fused probabilities; *world*: of equation 5 "
        "over the world's habits.",
        "",
        "| λ | divergence | "
        + " | ".join(f"outside top {k}" for k in TOP_KS)
        + " | mass, top 5 | pair | world | student |",
        "|" + "---|" * (6 + len(TOP_KS)),
    ]
    at = {k: {row.lam: row for row in found.rows} for k, found in previews.items()}
    for lam in SHOWN:
        student = f"{students[lam]:.3f}" if lam in students else "–"
        lines.append(
            f"| {lam:g} | {at[5][lam].divergence:.4f} | "
            + " | ".join(f"{at[k][lam].outside:.3%}" for k in TOP_KS)
            + f" | {at[5][lam].mass_outside:.3%} | {own[lam].accuracy:.3f} | "
            f"{world[lam].accuracy:.3f} | {student} |"
        )
    breaks = next((lam for lam in PREVIEW_LAMBDAS if own[lam].accuracy < own[0.0].accuracy), None)
    peak = max(PREVIEW_LAMBDAS, key=lambda lam: own[lam].accuracy)
    leaving = ", ".join(
        f"k = {k}: {'never' if found.leaves_at is None else f'λ = {found.leaves_at:g}'}"
        for k, found in previews.items()
    )
    lines += [
        "",
        f"The pair's accuracy is highest at λ = {peak:g} ({own[peak].accuracy:.3f}) and falls below "
        f"that of λ = 0 ({own[0.0].accuracy:.3f}) from λ = {breaks:g} on. The top choice leaves both "
        f"models' top k, at one token in a thousand, at {leaving}.",
    ]
    print("\n".join(lines))
    REPORT.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _students() -> dict[float, float]:
    """Accuracy of the students of one round without a gate, by λ."""
    students = json.loads(STUDENTS.read_text(encoding="utf-8"))["students"]
    return {
        student["lambda"]: student["accuracy"]
        for student in students
        if (student["source"], student["gate"], student["rounds"]) == ("aligned", None, 1)
    }


if __name__ == "__main__":
    main()
