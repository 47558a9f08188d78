"""Whether `tune` keeps its promise, and what it spends, on worlds whose truth is known.

    python benchmarks/tune.py                  # 2000 repetitions a world, 15 minutes on one core
    python benchmarks/tune.py --quick          # 200 repetitions

A question's accuracy under the reference is drawn from a beta distribution; a setting changes it
by its own mean effect and by a part that it shares with the others, so that settings are alike.
The samples are asked by the same engine that `flexalign tune` uses. The report goes to
benchmarks/results/tune.md.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from flexalign.calibration import NonInferiority, TuneOptions, select_setting
from flexalign.evaluation.samples import Samples

REPORT = Path("benchmarks/results/tune.md")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class World:
    """Questions and settings with known effects.

    Attributes:
        name: In the report.
        effects: True difference of accuracy to the reference, safest setting first.
        cuts: Share of tokens that each saves.
        questions: How many.
        samples: Of each.
        accuracy: Mean of the reference's beta distribution.
        margin: Of the promise.
        rare: Whether a loss falls on few questions, whole, instead of on all a little.
    """

    name: str
    effects: tuple[float, ...]
    cuts: tuple[float, ...]
    questions: int = 500
    samples: int = 8
    accuracy: float = 0.75
    margin: float = 0.03
    rare: bool = False

    @property
    def settings(self) -> list[str]:
        return [f"λ={step + 1}" for step in range(len(self.effects))]

    def best(self) -> str | None:
        able = [step for step, effect in enumerate(self.effects) if effect > -self.margin]
        return self.settings[max(able, key=lambda step: self.cuts[step])] if able else None


CUTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
WORLDS = (
    World("all exactly at −margin", (-0.03,) * 6, CUTS),
    World("two equal, four at −margin", (0.0, 0.0, -0.03, -0.03, -0.03, -0.03), CUTS),
    World("all at −margin, 100 questions", (-0.05,) * 6, CUTS, questions=100, margin=0.05),
    World("all at −margin, AIME", (-0.08,) * 6, CUTS, questions=30, accuracy=0.5, margin=0.08),
    World("all at −margin, near 1", (-0.02,) * 6, CUTS, accuracy=0.97, margin=0.02),
    World("all at −margin, rare losses", (-0.03,) * 6, CUTS, accuracy=0.9, rare=True),
    World("one clearly best", (0.0, 0.0, 0.0, -0.15, -0.25, -0.4), (0.1, 0.2, 0.4, 0.5, 0.55, 0.6)),
    World("boldest best", (0.0, 0.0, 0.0, 0.0, 0.0, 0.0), CUTS),
    World("a slope", (0.0, -0.005, -0.01, -0.02, -0.04, -0.08), CUTS),
    World("none: all clearly worse", (-0.1, -0.12, -0.15, -0.2, -0.25, -0.4), CUTS),
    World("none: all just below", (-0.035, -0.035, -0.035, -0.04, -0.04, -0.05), CUTS),
)
COMPARED = ("all exactly at −margin", "all at −margin, rare losses", "one clearly best", "a slope")
WAYS = {
    "default": TuneOptions(confidence=CONFIDENCE),
    "one look": TuneOptions(confidence=CONFIDENCE, look_count=1),
    "pocock": TuneOptions(confidence=CONFIDENCE, looks="pocock"),
    "betting": TuneOptions(confidence=CONFIDENCE, looks="betting"),
    "one finalist": TuneOptions(confidence=CONFIDENCE, finalists=1),
    "choosing ≤ 15 %": TuneOptions(confidence=CONFIDENCE, choosing_share=0.15),
    "choosing ≤ 45 %": TuneOptions(confidence=CONFIDENCE, choosing_share=0.45),
}


def truth(world: World, generator: np.random.Generator) -> np.ndarray:
    """True accuracies, shape (1 + settings, questions); their mean effect holds in expectation."""
    spread = 0.7  # a + b of the beta: most questions are nearly always or nearly never answered
    base = generator.beta(
        world.accuracy * spread, (1 - world.accuracy) * spread, size=world.questions
    )
    rows = [base]
    common = generator.random(world.questions)
    wobble = generator.normal(0, 1, world.questions)
    for effect in world.effects:
        if world.rare:
            own = generator.random(world.questions)
            lost = np.where(generator.random(world.questions) < 0.5, common, own)
            rows.append(base * (lost >= -effect / world.accuracy))
            continue
        share = effect / world.accuracy if effect < 0 else 0.0
        own = 0.7 * wobble + 0.7 * generator.normal(0, 1, world.questions)
        # odds move symmetrically in expectation: base(1 − base) is what can move either way
        rows.append(base * (1 + share) + 0.4 * np.tanh(own) * base * (1 - base) * (1 + share))
    return np.clip(np.array(rows), 0, 1)


def repeat(world: World, options: TuneOptions, seed: int) -> tuple[str | None, int, int]:
    """One tuning: the setting chosen, samples spent, samples of the whole sweep."""
    generator = np.random.default_rng(seed)
    rates = dict(zip(["λ=0", *world.settings], truth(world, generator), strict=True))
    cuts = dict(zip(["λ=0", *world.settings], (0.0, *world.cuts), strict=True))

    def ask(setting: str, questions: Sequence[str], samples: int) -> Samples:
        rate = rates[setting][[int(question) for question in questions]]
        shape = (len(questions), samples)
        tokens = 4000 * (1 - cuts[setting]) * generator.lognormal(0, 0.6, shape)
        return Samples.from_table(generator.random(shape) < rate[:, None], tokens, questions)

    questions = [str(number) for number in range(world.questions)]
    how = replace(options, samples=world.samples, seed=seed)
    tuned = select_setting(
        world.settings, ask, questions, NonInferiority(world.margin), options=how
    )
    return tuned.chosen, tuned.samples, tuned.exhaustive


def summarise(world: World, options: TuneOptions, repetitions: int) -> dict[str, float]:
    effects = dict(zip(world.settings, world.effects, strict=True))
    cuts = dict(zip(world.settings, world.cuts, strict=True))
    results = [repeat(world, options, seed) for seed in range(repetitions)]
    broken = sum(chosen is not None and effects[chosen] <= -world.margin for chosen, *_ in results)
    return {
        "broken": broken / repetitions,
        "none": sum(chosen is None for chosen, *_ in results) / repetitions,
        "best": sum(chosen == world.best() for chosen, *_ in results) / repetitions,
        "saved": sum(cuts[chosen] if chosen else 0.0 for chosen, *_ in results) / repetitions,
        "spent": sum(spent / whole for _, spent, whole in results) / repetitions,
    }


def allowed(repetitions: int) -> float:
    """The most broken promises that chance explains (99.9 %), as a share."""
    error = 1 - CONFIDENCE
    z = float(ndtri(0.999))
    return error + z * (error * (1 - error) / repetitions) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 repetitions")
    parser.add_argument("--output", type=Path, default=REPORT)
    arguments = parser.parse_args()
    repetitions = 200 if arguments.quick else 2000
    lines = [
        f"`python benchmarks/tune.py{' --quick' * arguments.quick}`: confidence {CONFIDENCE:g}, so "
        f"that a promise may be broken in {1 - CONFIDENCE:.0%} of repetitions; in up to "
        f"{allowed(repetitions):.1%} of {repetitions} and {allowed(repetitions // 10):.1%} of "
        f"{repetitions // 10} by chance. *Tokens saved*: mean, nothing where none is chosen. "
        "*Spent*: samples, as a share of the sweep of every setting on every question.",
        "",
        "| world | way | repetitions | promise broken | best chosen | none | tokens saved | spent |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for way, options in WAYS.items():
        count = repetitions if way == "default" else repetitions // 10
        for world in WORLDS:
            if way != "default" and world.name not in COMPARED:
                continue
            row = summarise(world, options, count)
            lines.append(
                f"| {world.name} | {way} | {count} | {row['broken']:.1%} | {row['best']:.1%} | "
                f"{row['none']:.1%} | {row['saved']:.1%} | {row['spent']:.1%} |"
            )
            print(lines[-1], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
