"""The results document's section on the dial, and its picture, from `dial.py`'s figures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _document import put_section

PICTURE = Path("docs/pictures/dial.png")

_HABITS = {"again": "r", "error": "ε", "check": "c"}
_ORDER = (
    "λ",
    "mixed dial",
    "fast",
    "adaptive",
    "exit",
    "coin",
    "soft",
    "hard",
    "two",
    "weights",
    "TrRa",
)
_DRAWN = {
    "mixed dial": "mixed dial",
    "adaptive dial": "adaptive dial",
    "soft budget, fast": "soft budget, fast adapter",
    "soft budget, pair": "soft budget, pair",
    "hard cut": "hard cut",
    "exit, fast adapter": "early exit, fast adapter",
    "exit, one stream": "early exit, one stream",
    "two models": "two models",
    "weights": "weights between",
    "TrRa": "TrRa",
}


def report(results: dict[str, Any]) -> str:
    """The section's text: tables, then the picture."""
    options = results["options"]
    lines = [
        f"`python benchmarks/dial.py`: {options['questions']} questions, the same for every "
        "setting, one response each at temperature 1 (the fast answers of the adaptive dial and "
        f"the coin are greedy), at most {options['limit']} tokens. Brackets: 95 % intervals. *Difference*: accuracy "
        "less that of λ = 0, paired. *Over the coin*: height over the line between λ = 0 and the "
        "greedy fast mode, both ends' own error included.",
        "",
        *_towards(results["branches"]),
        *_miscopied(results["miscopied"]),
        *_settings(results["rows"], results["threshold"]),
        *_confirmed(results["confirmed"], options["confirming_questions"]),
        *_budgets(results["budgets"]),
        "![Accuracy against tokens](pictures/dial.png)",
        "",
    ]
    return "\n".join(lines)


def exit_table(results: dict[str, Any]) -> str:
    """The table of early exits alone."""
    return "\n".join(_table(results["rows"], None))


def publish(results: dict[str, Any]) -> None:
    """Draw the picture and put the section between its marks in the results document."""
    draw(results)
    put_section("dial", report(results))


def draw(results: dict[str, Any]) -> None:
    """Draw accuracy against tokens, the coin as a line."""
    from flexalign.evaluation.frontier import ParetoCurve, ParetoPoint, draw_pareto

    points = [
        ParetoPoint(
            _label(row, results["threshold"]),
            _DRAWN[row["system"]],
            row["tokens"][1],
            (row["tokens"][0], row["tokens"][2]),
            row["accuracy"][1],
            (row["accuracy"][0], row["accuracy"][2]),
        )
        for row in results["rows"]
        if row["system"] in _DRAWN
    ]
    slow = _find(results["rows"], "mixed dial", "λ=0")
    fast = _find(results["rows"], "fast, greedy", "greedy")
    line = ParetoCurve(
        "coin between slow and fast",
        [fast["tokens"][1], slow["tokens"][1]],
        [fast["accuracy"][1], slow["accuracy"][1]],
    )
    draw_pareto(PICTURE, points, [line], "The miniature: one adapter, many dials")


def _towards(branches: list[dict[str, Any]]) -> list[str]:
    methods = list(dict.fromkeys(row["method"] for row in branches))
    lines = [
        "**(a) An adapter trained towards the aligned model.** Probabilities at the branches of "
        "given traces, and in brackets the form of the adapter's *own* two ends (equation 5 over "
        "its mean habits at λ = 0 and 1); accuracy and tokens are the closed form's at those, and "
        "hold for a model that stays in its world.",
        "",
        "| adapter | λ | " + " | ".join(_HABITS.values()) + " | accuracy | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        for row in (row for row in branches if row["method"] == method):
            habits = " | ".join(
                f"{row['habits'][habit]:.3f} ({row['form'][habit]:.3f})" for habit in _HABITS
            )
            outcome = row["form_outcome"]
            lines.append(
                f"| {method} | {row['lambda']:g} | {habits} | {outcome['accuracy']:.3f} "
                f"| {outcome['tokens']:.1f} |"
            )
    return [*lines, ""]


def _miscopied(shares: dict[str, float]) -> list[str]:
    lines = ["Responses of the SFT adapter's dial that do not add the question's own numbers:", ""]
    lines += ["| " + " | ".join(name.replace("concise ", "λ=") for name in shares) + " |"]
    lines += ["|---" * len(shares) + "|"]
    lines += ["| " + " | ".join(f"{share:.1%}" for share in shares.values()) + " |", ""]
    return lines


def _settings(rows: list[dict[str, Any]], threshold: float) -> list[str]:
    return [
        "**(b), (c) Every way on the same questions.** The threshold τ = "
        f"{threshold:g} was chosen on other questions: the best accuracy there among those that "
        "cut tokens by 62 % or more.",
        "",
        *_table(rows, threshold),
    ]


def _confirmed(rows: list[dict[str, Any]], questions: int) -> list[str]:
    return [
        f"**The adaptive dial at the chosen threshold, on {questions} questions more.**",
        "",
        *_table(rows, None),
    ]


def _table(rows: list[dict[str, Any]], threshold: float | None) -> list[str]:
    lines = [
        "| way | setting | accuracy | tokens | cut | difference | over the coin |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_place_in_table):
        is_chosen = row["system"] == "adaptive dial" and row["setting"] == f"τ={threshold}"
        mark = "**" if is_chosen else ""
        lines.append(
            f"| {mark}{row['system']}{mark} | {mark}{row['setting']}{mark} "
            f"| {_interval(row['accuracy'])} | {row['tokens'][1]:.1f} | {row['cut']:.1%} | {_signed(row['difference'])} "
            f"| {_signed(row['over_coin'])} |"
        )
    return [*lines, ""]


def _budgets(rows: Iterable[dict[str, Any]]) -> list[str]:
    lines = [
        "**Soft budget against hard cut at equal mean tokens**: the hard cut is a mixture of the "
        "two budgets beside it that spends as many tokens.",
        "",
        "| way | setting | tokens | accuracy | hard cut | difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['system']} | {row['setting']} | {row['tokens']:.1f} | {row['accuracy']:.3f} "
            f"| {row['hard_accuracy']:.3f} | {_signed(row['difference'])} |"
        )
    return [*lines, ""]


def _place_in_table(row: dict[str, Any]) -> tuple[int, str, float]:
    """By way, then by tokens; the ways in the order in which they are told of."""
    system = str(row["system"])
    ranks = [rank for rank, name in enumerate(_ORDER) if system.startswith(name)]
    return ranks[0] if ranks else len(_ORDER), system, float(row["tokens"][1])


def _find(rows: Iterable[dict[str, Any]], system: str, setting: str) -> dict[str, Any]:
    return next(row for row in rows if row["system"] == system and row["setting"] == setting)


def _label(row: dict[str, Any], threshold: float) -> str:
    if row["system"] == "adaptive dial" and row["setting"] != f"τ={threshold:g}":
        return ""
    return str(row["setting"].split(",")[0])


def _interval(interval: list[float]) -> str:
    low, middle, high = interval
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _signed(interval: list[float]) -> str:
    low, middle, high = interval
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"
