"""The report: figures as JSON, a table and whole answers as Markdown, a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from concise import read_rows
from measure import OPENING, difference, draw, measure

from flexalign.models.loading import load_model, load_tokenizer

SHOWN = 3

_COLUMNS = (
    "system",
    "λ",
    "tokens",
    "against the reference",
    "truncated",
    "distinct-2",
    f"of {OPENING} words",
    "perplexity",
    f"of {OPENING} tokens",
)

_LABELS = {"trra": "TrRa", "dial": "LoRA dial"}


def make_report(
    output: Path, reference: str, lams: Sequence[float], dial_lams: Sequence[float]
) -> None:
    """Measure every system's answers; write ``report.json``, ``report.md`` and ``smollm2.png``."""
    systems = [("reference", "reference", 0.0), ("aligned", "aligned", 1.0)]
    systems += [("trra", f"lambda={lam:g}", lam) for lam in lams]
    systems += [("dial", f"dial-lambda={lam:g}", lam) for lam in dial_lams]
    answers = {name: read_rows(output / "answers" / f"{name}.jsonl") for _, name, _ in systems}
    model, tokenizer = load_model(reference), load_tokenizer(reference)
    rows = []
    for system, name, lam in systems:
        figures = measure(answers[name], model, tokenizer)
        against = difference(answers[name], answers["reference"])
        rows.append({"system": system, "lambda": lam, **figures, "difference": against})
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    (output / "report.json").write_text(text, encoding="utf-8")
    draw(rows, output / "smollm2.png")
    parts = [table(rows)]
    parts += [samples(name, answers[name]) for _, name, _ in systems]
    (output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as a Markdown table; intervals are 95 %."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for row in rows:
        label = _LABELS.get(row["system"], row["system"])
        cells = [
            label,
            f"{row['lambda']:g}",
            _interval(row["tokens"], "{:.1f}"),
            "" if label == "reference" else _interval(row["difference"], "{:+.1f}"),
            _interval(row["truncated"], "{:.2f}"),
            f"{row['distinct_2']:.3f}",
            f"{row['distinct_2_opening']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['perplexity_opening']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def samples(name: str, answers: Sequence[dict[str, Any]]) -> str:
    """The first answers, whole and as they came out."""
    parts = [f"#### {name}"]
    for row in answers[:SHOWN]:
        ending = " (cut off here)" if row["truncated"] else ""
        parts.append(_quoted(_text(row["prompt"])))
        parts.append(_fenced(_text(row["completion"])))
        parts.append(f"{row['tokens']} tokens{ending}")
    return "\n\n".join(parts)


def _interval(interval: dict[str, float], form: str) -> str:
    low, mean, high = (form.format(interval[part]) for part in ("low", "mean", "high"))
    return f"{mean} [{low}, {high}]"


def _text(messages: list[dict[str, str]]) -> str:
    return messages[-1]["content"]


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
