"""The tables of `grpo.py`, and its section of the results, from its stored cells."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _cells import JUDGED, to_json
from _document import put_section
from _lora_dial_report import Row, accuracy, by_lambda, departure, mean, mean_of, tokens

RAW = Path("benchmarks/results/grpo.json")
REPORT = Path("benchmarks/results/grpo.md")

LAMS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
METHODS = ("pair", "student", "dial", "rounds", "interpolated")
GATELESS = ("interpolated",)
"""Methods that know no gate; they are measured once, and stand in both tables."""

_NAMES = {
    "pair": "two models",
    "dial": "LoRA dial",
    "rounds": "two rounds of √λ",
    "interpolated": "interpolated weights",
}


def publish(results: dict[str, Any]) -> None:
    """Write the figures and their tables."""
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_text(to_json(results), encoding="utf-8")
    REPORT.write_text(report(results), encoding="utf-8")
    put_section("grpo", section(results))


def section(results: dict[str, Any]) -> str:
    """The section of the results: the aligned models, each pair decoded, then every method."""
    options, rows, gates = results["options"], results["rows"], results["gates"]
    lines = [
        f"`flexalign miniature align --method grpo --seed 0`, 1 and 2, and `python benchmarks/grpo.py`: "
        f"{options['questions']} questions for each setting of a pair "
        f"([all tables](../{REPORT.as_posix()})).",
        "",
        "| aligned model | accuracy | change | tokens | change |",
        "|---|---|---|---|---|",
    ]
    for name, record in results["alignments"].items():
        change, side, reward = record["change"], record["aligned"], record["options"]["reward"]
        named = name.replace("=", " ") if reward == "right" else f"control, {reward} reward"
        lines.append(
            f"| {named} | {_bracket(side['accuracy'], 3)} | {_bracket(change['accuracy'], 3, '+')} "
            f"| {_bracket(side['tokens'], 1)} | {_bracket(change['tokens'], 1, '+')} |"
        )
    lines += [
        "",
        "Accuracy and tokens of the two models, decoded together, beside the pair's *own form*; "
        "gated by the τ that `inspect --diff` proposes:",
        "",
        *_pairs(rows, gates),
    ]
    for gated in (False, True):
        columns = _columns(rows, gated)
        seeds = {
            method: sorted({row["seed"] for same in column.values() for row in same})
            for method, column in columns.items()
        }
        told = "; ".join(
            f"{_NAMES.get(method, method)} {', '.join(map(str, own))}"
            for method, own in seeds.items()
        )
        lines += [
            f"By every method, {'gated' if gated else 'plain'}: means over the seeds, brackets from "
            f"the lowest to the highest end of their intervals (seeds: {told}):",
            "",
            *_table(columns),
            "",
        ]
    return "\n".join(lines)


def _pairs(rows: Sequence[Row], gates: dict[str, float]) -> list[str]:
    """The two models of each seed, plain beside their own form and gated."""
    seeds = sorted({row["seed"] for row in rows if row["method"] == "pair"})
    heads, columns = [], []
    for seed in seeds:
        own = [row for row in rows if row["method"] == "pair" and row["seed"] == seed]
        plain, gated = (_columns(own, which)["pair"] for which in (False, True))
        heads += [f"seed {seed}, plain", "own form", f"τ = {gates[str(seed)]:.3f}"]
        columns += [
            {lam: _outcome(same) for lam, same in plain.items()},
            {lam: _own_form(same) for lam, same in plain.items()},
            {lam: _outcome(same) for lam, same in gated.items()},
        ]
    lines = ["| λ | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for lam in LAMS:
        cells = [column.get(lam, "–") for column in columns]
        lines.append(f"| {lam:g} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _outcome(rows: Sequence[Row]) -> str:
    return f"{mean_of(rows, 'accuracy'):.3f}, {tokens(rows)}"


def _own_form(pair: Sequence[Row]) -> str:
    accuracy, tokens = (mean(pair, "pair_outcome", name) for name in ("accuracy", "tokens"))
    return f"{accuracy:.3f}, {tokens:.1f}"


def report(results: dict[str, Any]) -> str:
    """The document of all cells that are there."""
    options, rows, gates = results["options"], results["rows"], results["gates"]
    lines = [
        "# Pairs whose aligned model was made by reinforcement learning",
        "",
        f"`python benchmarks/grpo.py`: {options['questions']} questions of the miniature at "
        f"temperature 1 for each setting; habits at the branches of {options['judged']} of the "
        "responses. Brackets: 95 % intervals. *Own form*: accuracy and tokens of the pair's own "
        "fused probabilities, measured at the branches that the two models' responses visit. A gate "
        "changes nothing at λ in [0, 1], so that the plain figures stand in both tables there; the "
        "dial, which is trained for all λ, is measured with and without it.",
        "",
        *_alignments(results["alignments"]),
        *_expected(results["alignments"], gates),
    ]
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        for gated in (False, True):
            what = "plain"
            if gated:
                what = f"gated by the proposed τ = {gates[str(seed)]:.4g}"
            lines += _methods(own, gated, f"## Seed {seed}, {what}: accuracy, tokens")
        lines += _departures(own)
    return "\n".join(lines)


def _alignments(records: dict[str, Any]) -> list[str]:
    """What each training changed, one row a model."""
    lines = [
        "## The aligned models",
        "",
        "| | steps | cost | accuracy | change | tokens | change | r | c | ε | q |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = next(iter(records.values()))["reference"]
    lines.append(f"| reference | – | – | {_side(reference, ('–', '–'))} |")
    for name, record in records.items():
        options, change = record["options"], record["change"]
        reward = options["reward"]
        cost = f"{options['cost']:g}" if reward == "right" else f"– ({reward} reward)"
        share = 100 * change["tokens"][1] / record["reference"]["tokens"][1]
        changes = (
            _bracket(change["accuracy"], 3, "+"),
            f"{_bracket(change['tokens'], 1, '+')} ({share:+.0f} %)",
        )
        side = _side(record["aligned"], changes)
        lines.append(f"| {name} | {options['steps']} | {cost} | {side} |")
    return [*lines, ""]


def _side(side: dict[str, Any], changes: tuple[str, str]) -> str:
    habits = [
        _bracket(side["habits"][habit], 3) if habit in side["habits"] else "–"
        for habit in ("again", "check", "error", "catch")
    ]
    figures = (_bracket(side["accuracy"], 3), changes[0], _bracket(side["tokens"], 1), changes[1])
    return " | ".join([*figures, *habits])


def _expected(records: dict[str, Any], gates: dict[str, float]) -> list[str]:
    """The closed form of equation 5 over the mean habits of each pair, which needs no sampling."""
    from flexalign.miniature.closed_form import expected_outcome, token_level

    found: dict[str, list[str]] = {}
    for name, record in records.items():
        gate = gates.get(name.removeprefix("seed="))
        for tau in (None, gate) if gate is not None else (None,):
            outcomes = [
                expected_outcome(token_level(*mean_habits_of(record), lam, tau)) for lam in LAMS
            ]
            label = name if tau is None else f"{name}, τ = {tau:.4g}"
            found[label] = [f"{one.accuracy:.3f}, {one.tokens:.1f}" for one in outcomes]
    lines = [
        "## Closed form over the mean habits: accuracy, tokens",
        "",
        "Equation 5 over the two models' mean habits, as if each habit were the same at all its "
        "branches. The models' own habits vary over their branches, which this leaves out.",
        "",
        "| | " + " | ".join(f"λ = {lam:g}" for lam in LAMS) + " |",
        "|---|" + "---|" * len(LAMS),
        *(f"| {label} | {' | '.join(cells)} |" for label, cells in found.items()),
    ]
    return [*lines, ""]


def mean_habits_of(record: dict[str, Any]) -> Any:
    """The measured habits of the reference and of an aligned model, from its record."""
    from dataclasses import replace

    from flexalign.miniature import REFERENCE

    return tuple(
        replace(REFERENCE, **{name: mean for name, (_, mean, _) in record[side]["habits"].items()})
        for side in ("reference", "aligned")
    )


def _columns(rows: Sequence[Row], gated: bool) -> dict[str, dict[float, list[Row]]]:
    """The rows of each method by λ, where plain ones stand for those that a gate does not change."""
    columns: dict[str, dict[float, list[Row]]] = {}
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        found = [row for row in own if (row["gate"] is not None) == gated]
        if gated:
            measured = {(row["lambda"], row["seed"]) for row in found}
            found += [
                row
                for row in own
                if row["gate"] is None
                and (row["lambda"] <= 1 or method in GATELESS)
                and method != "dial"
                and (row["lambda"], row["seed"]) not in measured
            ]
        if found:
            columns[method] = by_lambda(found)
    return columns


def _table(columns: dict[str, dict[float, list[Row]]]) -> list[str]:
    """All methods side by side, beside the pair's own form."""
    pair = columns.get("pair", {})
    names = [_NAMES.get(method, method) for method in columns]
    lines = [
        "| λ | own form | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for lam in LAMS:
        cells = [
            f"{accuracy(same)}, {tokens(same)}" if (same := column.get(lam)) else "–"
            for column in columns.values()
        ]
        form = _own_form(pair[lam]) if lam in pair else "–"
        lines.append(f"| {lam:g} | {form} | " + " | ".join(cells) + " |")
    return lines


def _methods(rows: Sequence[Row], gated: bool, title: str) -> list[str]:
    """All methods of a seed, then where each one's accuracy is highest."""
    columns = _columns(rows, gated)
    if not columns.keys() - set(GATELESS):
        return []
    lines = [title, "", *_table(columns), ""]
    for method, column in columns.items():
        best = max(column, key=lambda lam: column[lam][0]["accuracy"])
        last = max(column)
        lines.append(
            f"- {_NAMES.get(method, method)}: most accurate at λ = {best:g} "
            f"({accuracy(column[best])}); at λ = {last:g} "
            f"{accuracy(column[last])} with {tokens(column[last])} tokens."
        )
    return [*lines, ""]


def _departures(rows: Sequence[Row]) -> list[str]:
    """The trained models' habits less the pair's own at the same branches."""
    own = [
        row for row in rows if row["method"] in ("student", "dial", "rounds") and "departure" in row
    ]
    if not own:
        return []
    lines = [
        "Trained model minus the pair's own form at the same branches, simultaneous 95 % intervals:",
        "",
        "| | λ | gate | r | c | ε |",
        "|---|---|---|---|---|---|",
    ]
    for row in own:
        gate = "–" if row["gate"] is None else f"{row['gate']:.4g}"
        cells = " | ".join(departure(row, habit) for habit in JUDGED)
        lines.append(f"| {row['method']} | {row['lambda']:g} | {gate} | {cells} |")
    return [*lines, ""]


def _bracket(interval: Sequence[float], digits: int, sign: str = "") -> str:
    low, middle, high = (f"{value:{sign}.{digits}f}" for value in interval)
    return f"{middle} [{low}, {high}]"
