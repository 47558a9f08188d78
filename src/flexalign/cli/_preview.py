"""``flexalign tune --preview``: what λ would do, read from traces."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from flexalign.cli.console import console, print_json, progress_bar, result_console
from flexalign.errors import ConfigError
from flexalign.lambdas import parse_lambdas

if TYPE_CHECKING:
    from flexalign.analysis.preview import Preview

_SHOWN = 13


def show_preview(
    system: str | None,
    traces: Path,
    lambdas: str | None,
    top_k: int,
    limit: int | None,
    batch_size: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Read traces with both models of a system, and print, draw and write what λ would do."""
    if system is None:
        raise ConfigError("SYSTEM is missing; say what is previewed: pair:REF,ALIGNED or a dial:.")
    asked = None if lambdas is None else [one.lam for one in parse_lambdas(lambdas)]
    from flexalign.analysis.preview import PREVIEW_LAMBDAS, preview
    from flexalign.cli.console import quieten_libraries
    from flexalign.data import load_traces, split_tokens
    from flexalign.data.rendering import bind_as_sampled
    from flexalign.models.compatibility import examine_pair
    from flexalign.systems import LocalBackend, parse_system

    parsed = parse_system(system)
    if parsed.kind not in ("pair", "dial"):
        raise ConfigError(f"{parsed.name} has no two models or streams; give pair: or dial:.")
    lams = PREVIEW_LAMBDAS if asked is None else asked
    rows = load_traces(traces)
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    quieten_libraries()
    backend = LocalBackend(parsed)
    is_pair = parsed.kind == "pair"
    tokenizer = examine_pair(*parsed.parts).tokenizer if is_pair else backend.text.tokenizer
    bind_as_sampled(tokenizer, rows)
    tokens = list(split_tokens(rows, tokenizer))

    loaded: Any = backend.load(device_map=None)
    model: Any = loaded.pair if is_pair else loaded
    with progress_bar("reading with both models", len(tokens)) as show:
        found = preview(
            model,
            tokens,
            lams=lams,
            top_k=top_k,
            batch_size=batch_size,
            progress=lambda done, _: show(done),
        )
    if output is not None:
        from flexalign._storage import write_json

        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "preview.json", found.to_json())
        _draw(found, output / "preview.png")
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)


def _print(found: "Preview") -> None:
    from flexalign.lambdas import LAMBDA_LEGEND

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("λ", "divergence", f"outside top {found.top_k}", "probability outside"):
        table.add_column(name, justify="right")
    step = max(1, -(-len(found.rows) // _SHOWN))
    for row in found.rows[step - 1 :: step]:
        table.add_row(
            f"{row.lam:g}",
            f"{row.divergence:.4f}",
            f"{100 * row.outside:.3f} %",
            f"{100 * row.mass_outside:.3f} %",
        )
    result_console.print(table)
    result_console.print(
        f"{LAMBDA_LEGEND}; {found.tokens:,} tokens; divergence of the teacher from the reference in nats per token; "
        "outside: the teacher's top choice is among neither model's likeliest.",
        style="dim",
        markup=False,
    )
    console.print(
        f"The teacher's choice leaves both models' top {found.top_k} (one token in a thousand) "
        + ("at no λ here." if found.leaves_at is None else f"from λ = {found.leaves_at:g} on.")
    )


def _draw(found: "Preview", path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot()
    lams = [row.lam for row in found.rows]
    left.plot(lams, [row.divergence for row in found.rows], color="C0")
    left.set_xlabel("λ")
    left.set_ylabel("KL(teacher ‖ reference), nats per token", color="C0")
    right = left.twinx()
    right.plot(lams, [100 * row.outside for row in found.rows], color="C3")
    right.set_ylabel(f"top choice outside both top {found.top_k}, %", color="C3")
    figure.savefig(path, dpi=150)
