"""The table of every dial beside every rival, its picture, and its section of the results.

What `rivals.py` measures is accuracy and tokens. What a token costs beside the plain model's is taken
from the figures of `dials.py`, and the fast end of the adaptive dial from those of `dial.py`.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _document import put_section

RAW = Path("benchmarks/results/rivals.json")
REPORT = Path("benchmarks/results/rivals.md")
PICTURE = Path("docs/pictures/rivals.png")
DIAL = Path("benchmarks/results/dial.json")
DIALS = Path("benchmarks/results/dials.json")
GATE = 0.01

COST_ROWS = "float32:32:"
"""The rows of `dials.py` that costs are taken from: the dtype and the tokens of a prompt."""
COST_MACHINE = "AMD EPYC"
"""The machine of costs; those that were not measured there are of another, which is named."""


@dataclass(frozen=True)
class Kind:
    """What a system is and needs.

    Attributes:
        training: What is trained before.
        models: Models or adapters in memory.
        streams: Forward passes for each token.
        setting: What is turned.
        cost: What its tokens are in `dials.py`; nothing if they were not measured.
        colour: Its colour in the picture.
        marker: Its marker in the picture.
        greedy: Which of its answers are greedy. Those are its policy's; all others are sampled.
    """

    training: str
    models: str
    streams: str
    setting: str
    cost: tuple[str, ...]
    colour: str
    marker: str
    greedy: str = ""


_PLAIN = ("plain",)
_FIRST, _TRIAL = "first", "trial"

KINDS = {
    "reference": Kind("–", "1", "1", "–", _PLAIN, "#000000", "o"),
    "aligned": Kind("–", "1", "1", "–", _PLAIN, "#808080", "s"),
    "prompt alone": Kind("–", "1", "1", "–", _PLAIN, "#b5a800", "P"),
    "hard budget": Kind("–", "1", "1", "tokens", (), "#8c564b", "v"),
    "bias on the end": Kind("–", "1", "1", "logit", (), "#e377c2", "D"),
    "early exit": Kind("–", "1", "1, and trials", "threshold", (), "#9467bd", "<", _TRIAL),
    "early exit, pair": Kind("–", "2", "2, and trials", "threshold", (), "#3f007d", ">", _TRIAL),
    "adaptive InRa dial": Kind(
        "one layer, once",
        "1 and a layer",
        "1 or 1 + 1",
        "threshold",
        ("inra, λ=0", "inra, λ=1"),
        "#d62728",
        "p",
        _FIRST,
    ),
    "two models": Kind("–", "2", "2", "λ", ("two models",), "#1f77b4", "X"),
    "interpolated weights": Kind("–", "1 for each λ", "1", "λ", _PLAIN, "#17becf", "*"),
    "interpolated, λ per question": Kind(
        "–", "1 at a time", "1, twice", "thresholds", _PLAIN, "#00555f", "8", _FIRST
    ),
    "scaled LoRA": Kind("a LoRA, once", "1 and a LoRA", "1", "λ", ("lora",), "#ff7f0e", "^"),
    "LoRA dial": Kind("a LoRA, once", "1 and a LoRA", "1", "λ", ("lora",), "#2ca02c", "h"),
    "student": Kind("all weights, for each λ", "1 for each λ", "1", "λ", _PLAIN, "#7f3b08", "d"),
}
_AGAINST_CHORD = ("early exit", "early exit, pair", "adaptive InRa dial")


def costs() -> dict[str, dict[str, Any]]:
    """The time of each system's step to the plain model's: least and most of its batches."""
    from dials import ratios

    measured = [
        row
        for row in json.loads(DIALS.read_text(encoding="utf-8"))["rows"]
        if row["row"].startswith(COST_ROWS)
    ]
    found = {}
    for name, kind in KINDS.items():
        has_all = [row for row in measured if kind.cost and set(kind.cost) <= set(row["methods"])]
        machines = [row["machine"]["cpu"] for row in has_all]
        if not machines:
            continue

        machine = COST_MACHINE if COST_MACHINE in machines else machines[0]
        medians = [
            statistics.median(ratios(row, method, "decode"))
            for row in has_all
            if row["machine"]["cpu"] == machine
            for method in kind.cost
        ]
        found[name] = {"least": min(medians), "most": max(medians), "machine": machine}
    return found


def mixtures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Hold the rows of policies against mixtures of rows, at equal tokens.

    Returns:
        ``fast``: accuracy and tokens of the adaptive dial's fast end, with their intervals.
        ``hull``: the corners of the best mixtures of all rows without a policy.
        ``distances``: for each row, its accuracy over the chord between its own ends, and over that
        hull; None where no mixture has so few tokens.
    """
    from flexalign.evaluation.frontier import Point, chord_distance, hull_distance, upper_hull

    def point(row: dict[str, Any]) -> Point:
        return Point(row["tokens"][1], row["accuracy"][1])

    ends = json.loads(DIAL.read_text(encoding="utf-8"))["confirmed"]
    fast = next(row for row in ends if row["system"] == "λ=1, greedy")
    slow = next((row for row in rows if row["system"] == "reference"), None)
    without = [row for row in rows if not KINDS[row["system"]].greedy]
    points = [point(row) for row in without]

    distances = []
    for row in rows:
        if slow is None or row["system"] not in _AGAINST_CHORD:
            continue
        # The rows of a system ascend by threshold, so that the first is its fast end.
        own = next(one for one in rows if one["system"] == row["system"])
        end = point(fast if row["system"] == "adaptive InRa dial" else own)
        place = point(row)
        has_mixtures = place.tokens >= min(points).tokens
        distances.append(
            {
                "system": row["system"],
                "setting": row["setting"],
                "chord": None
                if row is own and end == place
                else chord_distance(place, point(slow), end),
                "hull": hull_distance(place, points) if has_mixtures else None,
            }
        )
    corners = upper_hull(points) if points else []
    return {
        "fast": {name: fast[name] for name in ("accuracy", "tokens")},
        "hull": [
            without[points.index(corner)] | {"accuracy": corner.accuracy, "tokens": corner.tokens}
            for corner in corners
        ],
        "distances": distances,
    }


def section(results: dict[str, Any]) -> str:
    """The section of the results: the command, the tables, what they leave out, and the picture."""
    lines = [
        f"`python benchmarks/rivals.py`: {results['questions']} questions of the miniature, the same "
        "for all, one answer each at temperature 1; tokens of rejected answers are counted. Only "
        f"{_greedy(_FIRST)}, and {_greedy(_TRIAL)}, are greedy. λ with "
        f"the gate τ = {GATE:g}, seed 0. Brackets: 95 % intervals. *Cost*: time of a token to the plain "
        "model's, least and most of batches of 1, 4 and 16 in float32 after prompts of 32 tokens, "
        f"[measured]({_DIALS_TABLE}) by `python benchmarks/dials.py` in the shape of SmolLM2-135M "
        f"({COST_MACHINE}, if no other is named; –: not measured). A LoRA's is that of a batch with "
        "another λ in each row; each token of the adaptive dial is of one stream.",
        "",
        "| system | setting | accuracy | tokens | cost | training | models | streams |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        kind = KINDS[row["system"]]
        lines.append(
            f"| {row['system']} | {_setting(row)} | {_bracket(row['accuracy'], 3)} "
            f"| {_bracket(row['tokens'], 1)} | {_cost(results['costs'].get(row['system']))} "
            f"| {kind.training} | {kind.models} | {kind.streams} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            *_notes(results["rows"]),
            *_against_mixtures(results["mixtures"]),
            f"![Accuracy against tokens]({PICTURE.relative_to('docs').as_posix()})",
            "",
        ]
    )


_DIALS_TABLE = "../benchmarks/results/dials.md"
_COIN = "[beside other ways](#what-can-one-layer-adapters-dial-do)"


def _greedy(which: str) -> str:
    names = [f"*{name}*" for name, kind in KINDS.items() if kind.greedy == which]
    return f"the {which} answers of {' and '.join(names)}"


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table does not have, and rows that surprise."""
    lines = [
        "*Native effort* has no row: the miniature's chat template reads no argument, and "
        "`--for low:reasoning_effort=low` is refused. With a model whose template has it: `flexalign "
        "evaluate low=model:PATH high=model:PATH --for low:reasoning_effort=low --for "
        "high:reasoning_effort=high --task …` ([one model, several prompts]"
        "(evaluation.md#one-model-several-prompts)).",
        "",
    ]
    tokens = {row["setting"]: row["tokens"][1] for row in rows if row["system"] == "hard budget"}
    if {"16", "32"} <= set(tokens):
        lines += [
            f"A budget bounds the thinking and not the answer, so that budgets of 16 and 32 cost "
            f"{tokens['16']:.1f} and {tokens['32']:.1f} tokens: the closing tag, the number and the end "
            "are three tokens more, and where a cut falls inside a sum the model often goes on behind "
            "`</think>` with further lines.",
            "",
        ]
    return lines


def _against_mixtures(found: dict[str, Any]) -> list[str]:
    """The table of the rows of policies, beside mixtures of rows."""
    if not found["distances"]:
        return []
    fast, corners = found["fast"], found["hull"]
    names = [f"{row['system']}, {_setting(row)}" for row in corners]
    return [
        "**Policies beside mixtures.** How far a row's accuracy is above what mixtures reach with as many "
        "tokens. *Chord*: a coin between the system's own slow and fast end, which are the reference and, "
        "for early exits, the row of the least threshold; for the adaptive dial the greedy fast answer "
        f"({fast['accuracy'][1]:.3f} with {fast['tokens'][1]:.1f} tokens, of other questions). *Hull*: the "
        f"best mixtures of all rows without a policy, whose corners are {'; '.join(names)}; no mixture "
        f"has fewer than {corners[0]['tokens']:.1f} tokens. Differences of means; single answers are not "
        f"kept, so that they have no intervals. The adaptive dial's height over its chord is {_COIN}, with "
        "intervals (*over the coin*).",
        "",
        "| system | setting | over the chord | over the hull |",
        "|---|---|---|---|",
        *(
            f"| {row['system']} | {_setting(row)} | {_distance(row['chord'], 'its end')} "
            f"| {_distance(row['hull'], 'no mixture')} |"
            for row in found["distances"]
        ),
        "",
    ]


def _setting(row: dict[str, Any]) -> str:
    turned = KINDS[row["system"]].setting
    return row["setting"] if turned == "–" else f"{turned} {row['setting']}"


def _cost(cost: dict[str, Any] | None) -> str:
    if cost is None:
        return "–"
    least, most = f"{cost['least']:.2f}", f"{cost['most']:.2f}"
    if cost["least"] == cost["most"]:
        return f"{cost['least']:g}"
    where = "" if cost["machine"] == COST_MACHINE else f" ({cost['machine'].split('(')[0]})"
    return f"{least} to {most}{where}"


def _bracket(interval: Sequence[float], digits: int) -> str:
    low, mean, high = interval
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _distance(distance: float | None, without: str) -> str:
    return without if distance is None else f"{distance:+.3f}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw accuracy against tokens with intervals, whole and from 0.7 on, a line for each system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 10), layout="constrained")
    whole, upper = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.2))
    for axes in (whole, upper):
        for name, kind in KINDS.items():
            own = [row for row in results["rows"] if row["system"] == name]
            if own:
                _draw_system(axes, own, name, kind)
        corners = results["mixtures"]["hull"]
        axes.plot(
            [row["tokens"] for row in corners],
            [row["accuracy"] for row in corners],
            linestyle=(0, (1, 2)),
            color="#4a5568",
            label="hull of rows without a policy",
        )
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.3)
    whole.set_ylim(-0.03, 1.0)
    upper.set_ylim(0.7, 0.97)
    upper.set_title("the same, from 0.7 on", fontsize="medium")
    upper.set_xlabel("tokens an answer, rejected answers counted")

    handles, labels = whole.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        title="hollow: first or trial answers are greedy; all others at temperature 1",
        title_fontsize="small",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _draw_system(axes: Any, rows: Sequence[dict[str, Any]], name: str, kind: Kind) -> None:
    sides = {
        side: [
            [row[key][1] - row[key][0] for row in rows],
            [row[key][2] - row[key][1] for row in rows],
        ]
        for side, key in (("xerr", "tokens"), ("yerr", "accuracy"))
    }
    axes.errorbar(
        [row["tokens"][1] for row in rows],
        [row["accuracy"][1] for row in rows],
        **sides,
        # Ladders of other λ are other dials, which no line joins; single rows are seen above lines.
        linestyle="none" if kind.setting == "thresholds" else "-",
        zorder=2 if len(rows) > 1 else 3,
        marker=kind.marker,
        markersize=6,
        markerfacecolor="white" if kind.greedy else kind.colour,
        color=kind.colour,
        linewidth=0.9,
        elinewidth=0.9,
        capsize=2,
        label=name,
    )


def publish(results: dict[str, Any]) -> None:
    """Write the figures, their table and their picture."""
    RAW.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    told = section(results)
    draw(results, PICTURE)
    put_section("rivals", told)

    # The report is in another folder than the results' page.
    for there, here in (
        ("pictures/", "../../docs/pictures/"),
        ("#", "../../docs/results.md#"),
        ("evaluation.md", "../../docs/evaluation.md"),
        (_DIALS_TABLE, Path(_DIALS_TABLE).name),
    ):
        told = told.replace(f"]({there}", f"]({here}")
    REPORT.write_text(f"# Every dial beside every cheap rival\n\n{told}", encoding="utf-8")
