"""What `flexalign evaluate` and `flexalign compare` share: settings in, tables out."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from flexalign.cli._shared import parse_lambdas, result_console
from flexalign.errors import ConfigError, LambdaError

if TYPE_CHECKING:
    from flexalign.evaluation.systems import Setting

_SHORT = {"adaptive": "threshold", "route": "share"}


def read_settings(lambdas: str | None, policies: Sequence[str]) -> "list[Setting]":
    """Read ``--lambda 0,0.5,1`` and every ``--policy``.

    Raises:
        ConfigError: If a policy is malformed, or a setting is given twice.
        LambdaError: If a λ is not a finite number.
    """
    from flexalign.evaluation.systems import unique_settings

    values: list[object] = list(parse_lambdas(lambdas)) if lambdas is not None else []
    return unique_settings([*values, *map(_policy, policies)])


def read_range(text: str | None) -> tuple[float, float] | None:
    """Read ``--lambda-range -1,2``.

    Raises:
        LambdaError: If it is not two numbers in order.
    """
    if text is None:
        return None
    limits = parse_lambdas(text)
    if len(limits) != 2 or limits[0] > limits[1]:
        raise LambdaError(f"--lambda-range takes LEAST,LARGEST, such as -1,2; got {text!r}.")
    return limits[0], limits[1]


def _policy(text: str) -> object:
    """Read a policy's JSON, or its short form: ``adaptive 0.5``, ``route 0.3``."""
    words = text.split()
    if not words or words[0] not in _SHORT or len(words) > 2:
        return text
    policy: dict[str, Any] = {"policy": words[0]}
    if len(words) == 2:
        try:
            policy[_SHORT[words[0]]] = float(words[1])
        except ValueError:
            raise ConfigError(
                f"--policy {text!r}: {words[1]!r} is not a number; write {words[0]} 0.5, or JSON "
                f"such as {json.dumps({'policy': words[0], _SHORT[words[0]]: 0.5})}."
            ) from None
    return policy


def print_summary(summary: dict[str, Any]) -> None:
    """Print the rows of a summary, and the means over tasks where there are several."""
    rows = summary["rows"]
    heads = [name for name in ("system", "task") if len({row[name] for row in rows}) > 1]
    constant = [rows[0][name] for name in ("system", "task") if name not in heads]
    if constant:
        result_console.print(" on ".join(constant), markup=False, style="bold")
    table = _table([*heads, "setting"], ["asked", "accuracy", "tokens", "cut", "to chord", "lost"])
    for row in rows:
        lost = row["truncated"] + row["unparsed"] + row["no_answer"]
        table.add_row(
            *(escape(row[name]) for name in [*heads, "setting"]),
            f"{row['n_questions']}×{row['n_samples'] / row['n_questions']:g}",
            _figure(row["accuracy"], row["accuracy_ci"], 100),
            _figure(row["tokens"], row["tokens_ci"]),
            _figure(row["token_cut"], row["token_cut_ci"], 100),
            _figure(row["chord_distance"], row["chord_distance_ci"], 100),
            f"{100 * lost:.1f}",
        )
    result_console.print(table)
    if "task" in heads:
        _print_means(summary["means"])
    result_console.print(_LEGEND, style="dim", markup=False)


_LEGEND = (
    "accuracy, cut (of tokens, against λ = 0 or the baseline) and lost (truncated, unparsed or no "
    "answer) in %; to chord: points of accuracy above a coin between λ = 0 and λ = 1 at equal "
    "tokens; in brackets 95 % intervals, clustered by question."
)


def _print_means(means: Sequence[dict[str, Any]]) -> None:
    table = _table(["system", "setting"], ["accuracy, mean", "cut, mean", "cut, pooled"])
    for mean in means:
        figures = (mean["accuracy"], mean["token_cut_mean"], mean["token_cut_pooled"])
        table.add_row(
            escape(mean["system"]),
            escape(mean["setting"]),
            *(_figure(figure, None, 100) for figure in figures),
        )
    result_console.print(table)


def _table(words: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in words:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right")
    return table


def _figure(value: float | None, interval: Sequence[float | None] | None, scale: float = 1) -> str:
    if value is None:
        return "—"
    text = f"{scale * value:.1f}"
    if interval is None or None in interval:
        return text
    low, high = (scale * float(end or 0.0) for end in interval)
    return f"{text} \\[{low:.0f}, {high:.0f}]"
