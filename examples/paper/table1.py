"""Table 1 from finished sweeps: the paper's figures, ours with intervals, and what a coin reaches.

    python examples/paper/table1.py out/paper/evaluation/* -o out/paper/table1.md

Every folder is one of `flexalign evaluate` with the systems named as below; ``reference`` and
``aligned`` must be among them. All systems answer the same questions with the same seeds, so that
differences are taken question by question. *To chord*: points of accuracy above the coin that sends
each question to the reference or to the aligned model, at equal tokens.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from flexalign.evaluation.frontier import distance_intervals
from flexalign.evaluation.samples import ResultsFolder, Samples
from flexalign.evaluation.summary import token_cut_mean
from flexalign.statistics import Interval

TASKS = {"aime": "AIME24", "aime25": "AIME25", "math500": "MATH-500"}
PAPER = {
    "reference": ((30.00, 12602), (19.58, 12278), (80.23, 4699)),
    "student-0.5": ((38.33, 10678), (28.75, 10254), (83.70, 3734)),
    "aligned": ((37.50, 8520), (30.41, 8143), (85.20, 3030)),
    "student-1.5": ((41.25, 8091), (30.83, 7353), (85.20, 2982)),
    "student-2": ((37.50, 7441), (28.33, 6498), (84.98, 2897)),
    "student-5": ((31.25, 6297), (27.50, 5652), (83.95, 2844)),
    "student-10": ((29.58, 6004), (25.00, 5174), (81.58, 2713)),
    "iter1": ((29.17, 5631), (25.00, 4434), (81.35, 2599)),
    "iter2": ((14.58, 4294), (15.42, 3887), (75.93, 2483)),
}
"""Accuracy in % and mean tokens on AIME24, AIME25 and MATH-500 (arXiv 2506.12704, Table 1)."""


def read(folders: list[Path]) -> dict[str, dict[str, Samples]]:
    """Return what was sampled, by task and by system."""
    rows = defaultdict(list)
    for path in folders:
        for row in ResultsFolder.read(path).rows:
            rows[row["task"], row["system"]].append(row)

    found: dict[str, dict[str, Samples]] = defaultdict(dict)
    for (task, system), group in rows.items():
        found[task][system] = Samples.from_rows(group)
    return found


def show(interval: Interval, scale: float = 1.0, digits: int = 1) -> str:
    """Write a figure with its interval."""
    low, mean, high = (f"{scale * part:.{digits}f}" for part in interval)
    return f"{mean} [{low}, {high}]"


def table(task: str, systems: dict[str, Samples]) -> list[str]:
    """Return the rows of one task, all of whose systems answered the same questions."""
    names = list(systems)
    ends = names.index("reference"), names.index("aligned")
    distances = distance_intervals(list(systems.values()), ends)

    lines = [
        f"## {TASKS.get(task, task)}",
        "",
        "| system | paper | accuracy, % | tokens | against the aligned model | to chord |",
        "|---|---|---|---|---|---|",
    ]
    aligned = systems["aligned"]
    for (name, one), distance in zip(systems.items(), distances, strict=True):
        paper = PAPER.get(name)
        theirs = "–"
        if paper is not None and task in TASKS:
            accuracy, tokens = paper[list(TASKS).index(task)]
            theirs = f"{accuracy:.1f}, {tokens}"
        assert distance.chord is not None
        lines.append(
            f"| {name} | {theirs} | {show(one.accuracy_interval(), 100)} | "
            f"{show(one.tokens_interval(), digits=0)} | "
            f"{show(one.accuracy_difference(aligned), 100)} | {show(distance.chord, 100)} |"
        )
    return [*lines, ""]


def cuts(found: dict[str, dict[str, Samples]]) -> list[str]:
    """Return the paper's token cut, the mean over tasks, of every system that answered all."""
    lines = ["| system | token cut, % |", "|---|---|"]
    for name in next(iter(found.values())):
        if all(name in systems for systems in found.values()):
            tokens, bases = (
                [systems[which].mean_tokens for systems in found.values()]
                for which in (name, "reference")
            )
            lines.append(f"| {name} | {100 * token_cut_mean(tokens, bases):.1f} |")
    return lines


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()

    found = read(options.folders)
    for task, systems in found.items():
        if not {"reference", "aligned"} <= systems.keys():
            sys.exit(f"error: {task} has no system called reference, or none called aligned.")
    lines = [line for task, systems in found.items() for line in table(task, systems)]
    options.output.write_text("\n".join([*lines, *cuts(found), ""]), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
