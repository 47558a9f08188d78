"""The tables of `concise.py`, from its stored cells."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _document import put_section

from flexalign.statistics import Interval, paired_difference_interval

RAW = Path("benchmarks/results/concise.json")
REPORT = Path("benchmarks/results/concise.md")

SYSTEMS = ("pair", "dial", "adapter")
LAMBDAS = (-1.0, -0.5, -0.25, 0.0, 0.5, 1.0)
PLACES = ((0, 150), (0, 900), (1, 150), (2, 150), (3, 150))
"""Layers of the reference before the adapter, and steps of its training."""

_NAMES = {
    "pair": "The two models, decoded together",
    "dial": "One LoRA for all λ of [−1, 2]",
    "adapter": "A layer adapter",
}
_HABITS = ("again", "error", "check", "catch", "quit")

Row = dict[str, Any]


def publish(results: dict[str, Any]) -> None:
    """Write the figures, without the single answers, and their tables."""
    RAW.parent.mkdir(parents=True, exist_ok=True)
    told = {key: value for key, value in results["options"].items() if key != "work"}
    rows = [_summary(results["rows"], row) for row in _ordered(results["rows"])]
    many = [_summary(results["many"], row) for row in _ordered(results["many"])]
    kept = results | {"options": told, "rows": rows, "many": many}
    RAW.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    REPORT.write_text(report(results), encoding="utf-8")
    put_section("concise", "\n".join([*_body(results, heading="###"), ""]))


def report(results: dict[str, Any]) -> str:
    """The document of all cells that are there."""
    return "\n".join(["# λ < 0 that pays", "", *_body(results, heading="##"), ""])


def _body(results: dict[str, Any], heading: str) -> list[str]:
    """The lines below the title, with headings of the given depth."""
    options = results["options"]
    rows = [_summary(results["rows"], row) for row in _ordered(results["rows"])]
    lines = [
        f"`python benchmarks/concise.py`: the pair `miniature:reference` and `miniature:concise`, "
        f"which differ in the habit `again` (r: 0.70 and 0.55) alone. {options['questions']} "
        f"questions at temperature 1, the same ones for each row; habits at the branches of "
        f"{options['judged']} of the responses. *Form*: equation 5 over the habits of the two worlds; "
        "*pair*: the fusion of both models' own probabilities at the same branches. *Gain*: accuracy "
        "minus that of λ = 0 of the same system, paired by question. Brackets: 95 % intervals.",
        "",
    ]
    for system in SYSTEMS:
        lines += _table(system, [row for row in rows if row["system"] == system], heading)
    lines += _many(results, heading)
    return [*lines, *_places(results["places"], heading)]


def _ordered(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (SYSTEMS.index(row["system"]), row["lambda"]))


def _summary(rows: Sequence[Row], row: Row) -> Row:
    """A row without its answers, and with its gain over λ = 0, which is the reference in any system."""
    zero = next((one for one in rows if one["lambda"] == 0), None)
    gain = None if zero is None else _gain(row, zero)
    return {k: v for k, v in row.items() if k not in ("right", "lengths")} | {"gain": gain}


def _gain(row: Row, reference: Row) -> Interval:
    right, base = (np.array(list(one["right"])) == "1" for one in (row, reference))
    questions = range(len(right))
    return paired_difference_interval(right, questions, base, questions)


def _table(system: str, rows: Sequence[Row], heading: str) -> list[str]:
    if not rows:
        return []
    where = rows[0]["training"]
    named = _NAMES[system]
    if system == "adapter":
        named += f" before layer {where['place']}, {where['steps']} steps"
    if system == "dial":
        named += f", {where['steps']} steps"
    lines = [
        f"{heading} {named}",
        "",
        "| λ | accuracy | form | tokens | form | gain over λ = 0 | r | r of the pair |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["accuracy_interval"]
        again = row.get("model_habits", row["pair_habits"])["again"]
        gain = row["gain"]
        shown = "–" if gain is None or not row["lambda"] else _interval(gain)
        lines.append(
            f"| {row['lambda']:g} | {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {row['expected']['accuracy']:.3f} | {row['tokens']:.1f} "
            f"| {row['expected']['tokens']:.1f} | {shown} | {again:.3f} "
            f"| {row['pair_habits']['again']:.3f} |"
        )
    missing = [f"{lam:g}" for lam in LAMBDAS if lam not in [row["lambda"] for row in rows]]
    if missing:
        lines += ["", f"λ = {', '.join(missing)} is not measured yet."]
    half = [row for row in rows if row["lambda"] == -0.5 and row["gain"] is not None]
    for row in half:
        reached = "yes" if row["gain"][0] > 0 else "no"
        lines += ["", f"The interval of the gain at λ = −0.5 is above 0: {reached}."]
    return [*lines, ""]


def _many(results: dict[str, Any], heading: str) -> list[str]:
    """The gain at λ = −0.5 of each system, over more questions."""
    rows = [_summary(results["many"], row) for row in _ordered(results["many"])]
    found = [row for row in rows if row["lambda"] and row["gain"] is not None]
    if not found:
        return []
    lines = [
        f"{heading} λ = −0.5 over {results['options']['many']} questions",
        "",
        "| | accuracy | form | tokens | form | gain over λ = 0 |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        low, high = row["accuracy_interval"]
        lines.append(
            f"| {_NAMES[row['system']]} | {row['accuracy']:.4f} [{low:.4f}, {high:.4f}] "
            f"| {row['expected']['accuracy']:.4f} | {row['tokens']:.1f} "
            f"| {row['expected']['tokens']:.1f} | {_interval(row['gain'], digits=4)} |"
        )
    return [*lines, ""]


def _places(places: Sequence[Row], heading: str) -> list[str]:
    if not places:
        return []
    lines = [
        f"{heading} Which place and steps reach it",
        "",
        "A layer adapter, the identity at first, is trained towards the concise model by TrRa's loss; "
        "its habits at λ = 1, on traces of the concise world (r = 0.55, and all others the "
        "reference's: ε 0.35, c 0.995, q 0.45, u 0.003).",
        "",
        "| before layer | steps | parameters | r | ε | c | q | u |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(places, key=lambda row: (row["place"], row["steps"])):
        habits = " | ".join(f"{row['habits'][habit]:.3f}" for habit in _HABITS)
        place = "none (after the last)" if row["place"] == 3 else row["place"]
        lines.append(f"| {place} | {row['steps']} | {row['parameters']:,} | {habits} |")
    return lines


def _interval(found: Sequence[float], digits: int = 3) -> str:
    low, mean, high = (f"{value:+.{digits}f}" for value in found)
    return f"{mean} [{low}, {high}]"
