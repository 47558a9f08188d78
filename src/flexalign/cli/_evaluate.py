"""What `flexalign evaluate` says beside its work, and the tables it shares with `flexalign compare`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from flexalign.cli.console import note, result_console
from flexalign.evaluation.systems import row_label

if TYPE_CHECKING:
    from flexalign.evaluation.samples import Lost
    from flexalign.evaluation.sweep import Sweep

_SHOWN = 5
_OF_EFFORT = ("temperature", "top_p", "max_new_tokens")


def warn_of_cuts(sweep: "Sweep") -> None:
    """Say whose tokens will be held against nothing."""
    alone = [
        system.name
        for system in sweep.systems
        if all(setting.lam != 0 for setting in sweep.settings_of(system))
    ]
    if alone:
        note(
            f"{', '.join(alone)}: no λ = 0 there, so that no token cut will be known; name the system "
            "to hold it against with --baseline."
        )


def warn_of_sampling(sweep: "Sweep") -> None:
    """Say that efforts are measured at other sampling options than they were calibrated at."""
    from dataclasses import asdict

    from flexalign.calibration.effort import note_on_sampling
    from flexalign.systems.local import LocalBackend

    if all(setting.effort is None for setting in sweep.settings):
        return
    for backend in sweep.backends.values():
        if isinstance(backend, LocalBackend) and backend.calibration is not None:
            calibrated = backend.calibration.get("sampling", {})
            warning = note_on_sampling(
                {name: calibrated.get(name) for name in _OF_EFFORT}, asdict(sweep.options)
            )
            if warning is not None:
                note(warning)


def describe_lost(lost: "list[Lost]", total: int) -> str:
    """Say which samples got no response, and why."""
    shown = "; ".join(
        f"question {one.cell.question} of {one.cell.task} at {one.cell.setting.label}, "
        f"{one.system}: {one.reason}"
        for one in lost[:_SHOWN]
    )
    more = f"; and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    return (
        f"{len(lost)} of {total} samples got no response ({shown}{more}). All others are saved; "
        "give the same command again to ask for these."
    )


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
            *(escape(row[name]) for name in heads),
            escape(row_label(row)),
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
    from flexalign.lambdas import LAMBDA_LEGEND

    result_console.print(f"{LAMBDA_LEGEND}; {_LEGEND}", style="dim", markup=False)


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
            escape(row_label(mean)),
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
