"""The tables of `lora_dial.py`, and its section of the results, from its stored cells."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _cells import JUDGED, to_json
from _document import put_section

RAW = Path("benchmarks/results/lora_dial.json")
REPORT = Path("benchmarks/results/lora_dial.md")

GATE = 0.01
PLAIN = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
GATED = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
_SIGNS = {"again": "r", "check": "c", "error": "ε"}
METHODS = ("dial", "pair", "student", "scaled", "interpolated")
_NAMES = {
    "pair": "two models",
    "scaled": "LoRA of λ = 1, scaled",
    "interpolated": "interpolated weights",
}

HABIT_MARGIN, ACCURACY_MARGIN = 0.01, 0.015
CUT, GAIN = 0.45, 0.10
"""What is to be reached: departures of the dial, and of λ = 5 from the reference."""

Row = dict[str, Any]


def publish(results: dict[str, Any]) -> None:
    """Write the figures and their tables."""
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_text(to_json(results | {"options": _told(results)}), encoding="utf-8")
    REPORT.write_text(report(results), encoding="utf-8")
    put_section("lora_dial", section(results))


def section(results: dict[str, Any]) -> str:
    """The section of the results: every method side by side, without and with the gate."""
    rows = [row for row in results["rows"] if row["pair"] == "miniature"]
    lines = [
        f"`python benchmarks/lora_dial.py`: accuracy and tokens of {results['options']['questions']} "
        f"questions a setting and seed; {_seeds(rows)}. [All tables](../{REPORT.as_posix()}).",
        "",
    ]
    for gate in (None, GATE):
        found = _methods_table(rows, gate)
        if found:
            lines += [f"**{_named(gate).capitalize()}:**", *found[1:]]
    return "\n".join(lines)


def _seeds(rows: Sequence[Row]) -> str:
    """Say which seeds of each method were measured."""
    found = {
        method: sorted({row["seed"] for row in rows if row["method"] == method})
        for method in METHODS
    }
    return "seeds measured: " + "; ".join(
        f"{_NAMES.get(method, method)} {', '.join(map(str, own)) or 'none'}"
        for method, own in found.items()
    )


def report(results: dict[str, Any]) -> str:
    """The document of all cells that are there."""
    options = results["options"]
    rows = [row for row in results["rows"] if row["pair"] == "miniature"]
    hybrid = [row for row in results["rows"] if row["pair"] == "hybrid"]
    lines = [
        "# One LoRA for every λ",
        "",
        f"`python benchmarks/lora_dial.py`: {options['questions']} questions of the miniature at "
        f"temperature 1 for each setting and seed; habits at the branches of "
        f"{options['judged']} of the responses; {_seeds(rows)}. Figures are means over the seeds; brackets are from the lowest to the highest end of "
        "their 95 % intervals. *pair*: the pair's own form, the fusion of both models' "
        "probabilities at the same branches.",
        "",
    ]
    for gate in (None, GATE):
        lines += _dial_table(rows, gate)
    for gate in (None, GATE):
        lines += _methods_table(rows, gate)
    if rows:
        lines += [*_targets(rows), *_costs(rows)]
    return "\n".join([*lines, *_hybrid_tables(hybrid)])


def _dial_table(rows: Sequence[Row], gate: float | None) -> list[str]:
    found = by_lambda(of(rows, "dial", gate))
    if not found:
        return []
    lines = [
        f"## The dial, {_named(gate)}",
        "",
        "| λ | r dial / pair | c | ε | accuracy | pair | tokens | pair |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for lam, same in found.items():
        habits = " | ".join(
            f"{mean(same, 'model_habits', h):.3f} / {mean(same, 'pair_habits', h):.3f}"
            for h in JUDGED
        )
        lines.append(
            f"| {lam:g} | {habits} | {accuracy(same)} "
            f"| {mean(same, 'pair_outcome', 'accuracy'):.3f} | {tokens(same)} "
            f"| {mean(same, 'pair_outcome', 'tokens'):.1f} |"
        )
    lines += [
        "",
        f"Dial minus pair at the same branches, simultaneous 95 % intervals over the three habits, "
        f"{_named(gate)}:",
        "",
        "| λ | seed | r | c | ε |",
        "|---|---|---|---|---|",
    ]
    for lam, same in found.items():
        for row in same:
            departures = " | ".join(departure(row, habit) for habit in JUDGED)
            lines.append(f"| {lam:g} | {row['seed']} | {departures} |")
    return [*lines, ""]


def _methods_table(rows: Sequence[Row], gate: float | None) -> list[str]:
    """All methods side by side; what knows no gate stands in both tables."""
    columns = {}
    for method in METHODS:
        own = of(rows, method, GATE if method in ("scaled", "interpolated") else gate)
        if own:
            columns[method] = by_lambda(own)
    if len(columns) < 2:
        return []
    lines = [
        f"## Beside what it replaces, {_named(gate)}: accuracy, tokens",
        "",
        "| λ | " + " | ".join(_NAMES.get(method, method) for method in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for lam in PLAIN if gate is None else GATED:
        cells = [
            f"{accuracy(same)}, {tokens(same)}" if (same := column.get(lam)) else "–"
            for column in columns.values()
        ]
        lines.append(f"| {lam:g} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _targets(rows: Sequence[Row]) -> list[str]:
    """What was to be reached, and what is."""
    lines = ["## To be reached", ""]
    for gate in (None, GATE):
        own = of(rows, "dial", gate)
        if not own:
            continue
        single, row = max(
            ((habit, row) for row in own for habit in row["departure"]),
            key=lambda one: abs(one[1]["departure"][one[0]][1]),
        )
        means = {
            (habit, lam): sum(one["departure"][habit][1] for one in same) / len(same)
            for lam, same in by_lambda(own).items()
            for habit in JUDGED
            if all(habit in one["departure"] for one in same)
        }
        habit, at = max(means, key=lambda place: abs(means[place]))
        worst = means[habit, at]
        expected = PLAIN if gate is None else GATED
        missing = [f"{lam:g}" for lam in expected if lam not in by_lambda(own)]
        if missing:
            lines.append(f"- {_named(gate)}: λ = {', '.join(missing)} is not measured yet.")
        lines.append(
            f"- {_named(gate)}: the largest departure of a habit from the pair's own form, mean over "
            f"the seeds, is {worst:+.4f} ({_SIGNS[habit]} at λ = {at:g}), and of one seed "
            f"{row['departure'][single][1]:+.4f} ({_SIGNS[single]} at λ = {row['lambda']:g}, seed "
            f"{row['seed']}); to be within ±{HABIT_MARGIN:g}: {_yes(abs(worst) <= HABIT_MARGIN)}."
        )
        gaps = {
            lam: mean_of(same, "accuracy") - mean(same, "pair_outcome", "accuracy")
            for lam, same in by_lambda(own).items()
        }
        lam = max(gaps, key=lambda lam: abs(gaps[lam]))
        lines.append(
            f"- {_named(gate)}: the largest departure of the accuracy, mean over the seeds, is "
            f"{gaps[lam]:+.3f} (λ = {lam:g}); to be within ±{ACCURACY_MARGIN:g}: "
            f"{_yes(abs(gaps[lam]) <= ACCURACY_MARGIN)}."
        )
    five = by_lambda(of(rows, "dial", GATE)).get(5.0)
    if five:
        from flexalign.miniature import REFERENCE
        from flexalign.miniature.closed_form import expected_outcome

        base = expected_outcome(REFERENCE)
        cut = 1 - mean_of(five, "tokens") / base.tokens
        gain = mean_of(five, "accuracy") - base.accuracy
        lines.append(
            f"- {_named(GATE)}, λ = 5: {cut:.1%} fewer tokens than the reference's closed form "
            f"({base.tokens:.1f}) at an accuracy of {gain:+.3f} to its {base.accuracy:.3f}; to be "
            f"at least {CUT:.0%} and {GAIN:+.2f}: {_yes(cut >= CUT and gain >= GAIN)}."
        )
    return [*lines, ""]


def _costs(rows: Sequence[Row]) -> list[str]:
    lines = [
        "## Cost of training",
        "",
        "Steps of 24 traces, and seconds of one core, mean over the trainings.",
        "",
        "| | λ | steps | seconds |",
        "|---|---|---|---|",
    ]
    for method, gate, what in (
        ("dial", None, "0 to 3.15, all"),
        ("dial", GATE, "0 to 5.25, all"),
        ("student", None, "one"),
        ("student", GATE, "one"),
        ("scaled", GATE, "one (1)"),
    ):
        costs = [row["training"] for row in of(rows, method, gate)]
        if costs:
            seconds = sum(cost["cpu_seconds"] for cost in costs) / len(costs)
            lines.append(
                f"| {method}, {_named(gate)} | {what} | {costs[0]['steps']} | {seconds:.0f} |"
            )
    return [*lines, ""]


def _hybrid_tables(rows: Sequence[Row]) -> list[str]:
    """One model under two prompts: all methods beside the closed form, and their departures."""
    columns = {method: by_lambda(own) for method in METHODS if (own := of(rows, method, GATE))}
    if not columns:
        return []
    names = {"pair": "two prompts, decoded"}
    lines = [
        f"## One model under two prompts, {_named(GATE)}",
        "",
        "`miniature:hybrid` without a system message is λ = 0, and under its system message λ = 1. "
        "*Closed form*: equation 5 over the habits of the two worlds that it was trained on.",
        "",
        "| λ | closed form | " + " | ".join(names.get(name, name) for name in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for lam in GATED:
        same = [column[lam] for column in columns.values() if lam in column]
        if same:
            world = same[0][0]["expected"]
            cells = [
                f"{accuracy(own)}, {tokens(own)}" if (own := column.get(lam)) else "–"
                for column in columns.values()
            ]
            told = f"{world['accuracy']:.3f}, {world['tokens']:.1f}"
            lines.append(f"| {lam:g} | {told} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Model minus the fusion of the two prompts at the same branches:",
        "",
        "| | λ | r | c | ε |",
        "|---|---|---|---|---|",
    ]
    for method, column in columns.items():
        for lam, same in column.items():
            if "departure" in same[0]:
                departures = " | ".join(departure(same[0], habit) for habit in JUDGED)
                lines.append(f"| {method} | {lam:g} | {departures} |")
    return [*lines, ""]


def of(rows: Sequence[Row], method: str, gate: float | None) -> list[Row]:
    return [row for row in rows if row["method"] == method and row["gate"] == gate]


def by_lambda(rows: Sequence[Row]) -> dict[float, list[Row]]:
    found: dict[float, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["lambda"], row["seed"])):
        found.setdefault(row["lambda"], []).append(row)
    return found


def mean(rows: Sequence[Row], key: str, name: str) -> float:
    return float(sum(row[key][name] for row in rows) / len(rows))


def mean_of(rows: Sequence[Row], key: str) -> float:
    return float(sum(row[key] for row in rows) / len(rows))


def accuracy(rows: Sequence[Row]) -> str:
    ends = [row["accuracy_interval"] for row in rows]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    return f"{mean_of(rows, 'accuracy'):.3f} [{low:.3f}, {high:.3f}]"


def tokens(rows: Sequence[Row]) -> str:
    return f"{mean_of(rows, 'tokens'):.1f}"


def departure(row: Row, habit: str) -> str:
    if None in row["departure"].get(habit, [None]):
        return "–"
    low, mean, high = row["departure"][habit]
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _named(gate: float | None) -> str:
    return "plain" if gate is None else f"gated (τ = {gate:g})"


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def _told(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results["options"].items() if key != "work"}
