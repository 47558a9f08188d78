"""How often the intervals cover the truth, by simulation with correlated samples.

    python benchmarks/coverage.py                 # minutes on one core
    python benchmarks/coverage.py --repeats 200   # a quick look

Each question has its own rate of success, drawn from a beta distribution; its samples share it.
For comparison: the plain percentile bootstrap over questions.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexalign.evaluation.frontier import distance_intervals
from flexalign.evaluation.samples import Samples
from flexalign.statistics import (
    clustered_interval,
    paired_difference_interval,
    token_cut_interval,
)

REPORT = Path("benchmarks/results/coverage.md")
SAMPLES = 8
MIDDLE = (0.2, 0.35, 0.5, 0.65, 0.8)
EXTREME = (0.95, 0.98, 0.99, 0.995)
COMPARED = 100
"""Repetitions of the plain bootstrap, which is slow."""
CONCENTRATIONS = (0.5, 2.0, 10.0)
"""α + β of the beta distribution: samples of a question correlate by 1/(1 + α + β)."""


@dataclass(frozen=True)
class Cell:
    """One setting of the simulation, and the band its coverage must lie in."""

    questions: int
    accuracy: float
    low: float
    high: float


CELLS = [
    *(Cell(n, p, 0.93, 0.97) for n in (100, 200, 500) for p in MIDDLE),
    *(Cell(n, p, 0.93, 1.0) for n in (100, 200, 500) for p in EXTREME),
    *(Cell(30, p, 0.93, 1.0) for p in (*MIDDLE, *EXTREME)),
]


def simulate(
    rng: np.random.Generator, cell: Cell, concentration: float, repeats: int
) -> Iterator[NDArray[np.float64]]:
    """Draw right and wrong answers, shape (questions, SAMPLES) each time."""
    alpha, beta = cell.accuracy * concentration, (1 - cell.accuracy) * concentration
    for _ in range(repeats):
        rates = rng.beta(alpha, beta, (cell.questions, 1))
        yield (rng.random((cell.questions, SAMPLES)) < rates).astype(float)


def share_coverage(cell: Cell, concentration: float, repeats: int) -> tuple[float, float]:
    """Coverage of the clustered interval, and of the percentile bootstrap."""
    rng = np.random.default_rng([cell.questions, round(1000 * cell.accuracy), repeats])
    clusters = np.repeat(np.arange(cell.questions), SAMPLES).tolist()
    ours = plain = 0
    compared = min(repeats, COMPARED)
    for number, drawn in enumerate(simulate(rng, cell, concentration, repeats)):
        low, _, high = clustered_interval(drawn.ravel(), clusters)
        ours += low <= cell.accuracy <= high
        if number >= compared:
            continue
        weights = rng.multinomial(cell.questions, np.full(cell.questions, 1 / cell.questions), 200)
        means = weights @ drawn.mean(axis=1) / cell.questions
        low, high = np.quantile(means, (0.025, 0.975))
        plain += low <= cell.accuracy <= high
    return ours / repeats, plain / compared


def dial_coverage(questions: int, top: float, repeats: int) -> dict[str, float]:
    """Coverage at a dial of three settings that share their questions' difficulty.

    A question's chance of success at the three settings is `top`, 0.93 `top` and 0.6 `top` of
    what its difficulty leaves; its tokens shrink with the setting. The truth comes from a
    population of a million questions.
    """
    rng = np.random.default_rng([questions, round(1000 * top), 1])

    def population(count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        ease = rng.beta(top * 3, (1 - top) * 3, count)
        length = rng.gamma(4, 250, count) * (1.5 - ease)
        return ease * np.array([[1.0], [0.93], [0.6]]), length * np.array([[1.0], [0.6], [0.1]])

    rates, lengths = population(1_000_000)
    accuracy, tokens = rates.mean(axis=1), lengths.mean(axis=1)
    share = (tokens[1] - tokens[2]) / (tokens[0] - tokens[2])
    truth = {
        "difference": accuracy[1] - accuracy[0],
        "token cut": 1 - tokens[1] / tokens[0],
        "chord": accuracy[1] - (accuracy[2] + share * (accuracy[0] - accuracy[2])),
    }
    clusters = np.repeat(np.arange(questions), SAMPLES).tolist()
    covered = dict.fromkeys(truth, 0)
    for _ in range(repeats):
        rates, lengths = population(questions)
        right = rng.random((3, questions, SAMPLES)) < rates[..., None]
        spent = lengths[..., None] * rng.gamma(10, 0.1, (3, questions, SAMPLES))
        rows = [(right[s].ravel().astype(float), spent[s].ravel()) for s in range(3)]
        settings = [Samples(clusters, *row) for row in rows]
        found = {
            "difference": paired_difference_interval(rows[1][0], clusters, rows[0][0], clusters),
            "token cut": token_cut_interval(rows[1][1], clusters, rows[0][1], clusters),
            "chord": distance_intervals(settings, (0, 2), repeats=1000)[1].chord,
        }
        for name, interval in found.items():
            assert interval is not None
            covered[name] += interval.low <= truth[name] <= interval.high
    return {name: count / repeats for name, count in covered.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2000)
    chosen = parser.parse_args(arguments)
    table = list(_tables(chosen.repeats, print))
    REPORT.write_text("\n".join(table) + "\n", encoding="utf-8")


def _tables(repeats: int, show: Callable[[str], None]) -> Iterator[str]:
    """The report's lines, shown as they come."""

    def line(text: str) -> str:
        show(text)
        return text

    yield line("# Coverage of the 95 % intervals\n")
    yield line(
        f"`python benchmarks/coverage.py --repeats {repeats}`: beta-binomial questions, "
        f"{SAMPLES} samples each, {repeats} repetitions (standard error about "
        f"{(0.95 * 0.05 / repeats) ** 0.5:.4f}). *Bootstrap*: the plain percentile bootstrap "
        f"over questions, for comparison ({COMPARED} repetitions). Over concentrations "
        f"{', '.join(f'{c:g}' for c in CONCENTRATIONS)}: lowest and highest coverage; *holds*: "
        "in the wanted band, to two standard errors.\n"
    )
    yield line("## Accuracy, `clustered_interval`\n")
    yield line("| questions | accuracy | wanted | covered | bootstrap | holds |")
    yield line("|---|---|---|---|---|---|")
    slack = 2 * (0.95 * 0.05 / repeats) ** 0.5
    for cell in CELLS:
        both = [share_coverage(cell, c, repeats) for c in CONCENTRATIONS]
        ours, plain = zip(*both, strict=True)
        holds = cell.low - slack <= min(ours) and max(ours) <= cell.high + slack
        yield line(
            f"| {cell.questions} | {cell.accuracy:g} | {cell.low:.2f}–{cell.high:.2f} "
            f"| {min(ours):.3f}–{max(ours):.3f} | {min(plain):.3f}–{max(plain):.3f} "
            f"| {'yes' if holds else 'no'} |"
        )
    few = max(100, repeats // 4)
    yield line(
        "\n## Paired accuracy difference, token cut, distance to the chord\n\n"
        f"A dial of three settings over shared questions, {few} repetitions.\n"
    )
    yield line("| questions | accuracy at the slow end | difference | token cut | chord |")
    yield line("|---|---|---|---|---|")
    for questions in (30, 100, 500):
        for top in (0.5, 0.8, 0.98):
            found = dial_coverage(questions, top, few)
            yield line(
                f"| {questions} | {top:g} | "
                + " | ".join(f"{value:.3f}" for value in found.values())
                + " |"
            )


if __name__ == "__main__":
    main()
