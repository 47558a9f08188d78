"""The results document's section on the miniature, and its picture, from `miniature.py`'s figures."""

import math
from pathlib import Path
from typing import Any

from _document import put_section

GATE = 0.01
JUDGED = ("again", "check", "error")
MARGIN = 0.01


def report(rows: dict[str, list[dict[str, Any]]], options: dict[str, Any]) -> str:
    """The section of the results document."""
    from flexalign.statistics import equivalent

    models = rows["models"]
    students = sorted(rows["students"], key=_place_in_table)
    reference = models[0]
    base = reference["tokens"]
    lines = [
        f"`python benchmarks/miniature.py`: {options['model_questions']} questions for each model as it is, "
        f"{options['questions']} for each student, temperature 1, no truncation; "
        f"students: {options['steps']} steps of 24, {options['divergence']} divergence. "
        "Brackets: 95 % intervals.",
        "",
        "**The pair** beside the world that it was trained on:",
        "",
        "| model | accuracy | world | tokens | world | r | world | c | world | ε | world |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in models:
        forced, world = row["forced_habits"], row["expected_habits"]
        lines.append(
            f"| {row['name']} | {_share(row)} | {row['expected']['accuracy']:.3f} "
            f"| {row['tokens']:.1f} | {row['expected']['tokens']:.1f} "
            + "".join(f"| {forced[h]:.3f} | {world[h]:.3f} " for h in JUDGED)
            + "|"
        )
    lines += [
        "",
        "**Students.** *World*: equation 5 over the world's habits. *Pair*: the pair's own form. "
        "`token cut` is against the reference's measured tokens.",
        "",
        "| setting | accuracy | world | pair | tokens | world | pair | token cut "
        "| r student / pair / world |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in [reference, models[1], *students]:
        pair = row.get("pair_outcome")
        habits = row.get("student_forced_habits") or row["forced_habits"]
        again = [habits, row.get("pair_habits"), row["expected_habits"]]
        lines.append(
            f"| {row['name']} | {_share(row)} | {row['expected']['accuracy']:.3f} "
            f"| {_number(pair, 'accuracy', 3)} | {row['tokens']:.1f} "
            f"| {row['expected']['tokens']:.1f} | {_number(pair, 'tokens', 1)} "
            f"| {1 - row['tokens'] / base:.1%} "
            f"| {' / '.join(_number(h, 'again', 3) for h in again)} |"
        )
    lines += [
        "",
        f"**Student minus pair** at the same branches of the student's own responses "
        f"({options['judged_questions']} questions), simultaneous 95 % intervals over the three "
        f"habits; *equivalent*: all three within ±{MARGIN:g}.",
        "",
        "| setting | r | c | ε | equivalent |",
        "|---|---|---|---|---|",
    ]
    for row in students:
        departure = row["departure"]
        inside = all(
            equivalent((own["low"], own["mean"], own["high"]), 0.0, MARGIN)
            for own in (departure[habit] for habit in JUDGED)
        )
        lines.append(
            f"| {row['name']} "
            + "".join(
                f"| {departure[h]['mean']:+.4f} [{departure[h]['low']:+.4f}, "
                f"{departure[h]['high']:+.4f}] "
                for h in JUDGED
            )
            + f"| {'yes' if inside else 'no'} |"
        )
    return "\n".join([*lines, "", "![Accuracy against tokens](pictures/miniature.png)", ""])


def _place_in_table(row: dict[str, Any]) -> tuple[bool, bool, int, float]:
    return row["source"] != "aligned", row["gate"] is not None, row["rounds"], row["lambda"]


def _share(row: dict[str, Any]) -> str:
    low, high = row["accuracy_interval"]
    return f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def _number(values: dict[str, float] | None, key: str, digits: int) -> str:
    if values is None or math.isnan(values[key]):
        return "–"
    return f"{values[key]:.{digits}f}"


def draw(rows: dict[str, list[dict[str, Any]]]) -> None:
    """The picture of the results document."""
    from flexalign.evaluation.frontier import ParetoPoint, draw_pareto
    from flexalign.miniature.demo import closed_form_curve

    def group(row: dict[str, Any]) -> str:
        if "source" not in row:
            return "the pair"
        if row["source"] == "placebo":
            return "placebo"
        kind = "TrRa" if row["rounds"] == 1 else "TrRa-iter"
        return kind + (", gated" if row["gate"] else "")

    points = [
        ParetoPoint(
            row["name"].split(", τ")[0].replace("placebo ", ""),
            group(row),
            row["tokens"],
            tuple(row["tokens_interval"]),
            row["accuracy"],
            tuple(row["accuracy_interval"]),
        )
        for row in rows["models"] + rows["students"]
    ]
    curves = [closed_form_curve(), closed_form_curve(GATE)]
    named = {point.label: point for point in points}
    ends = [(named["reference"], named["aligned"])]
    draw_pareto(Path("docs/pictures/miniature.png"), points, curves, "The miniature: TrRa", ends)


def publish(rows: dict[str, list[dict[str, Any]]], options: dict[str, Any]) -> None:
    """Draw the picture and put the section between its marks in the results document."""
    draw(rows)
    put_section("miniature", report(rows, options))
