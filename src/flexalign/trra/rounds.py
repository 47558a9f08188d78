"""TrRa-iter: realign the reference again and again, each time from the last round's result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexalign.errors import ConfigError
from flexalign.schedules import Schedule

__all__ = ["LARGEST_EFFECTIVE_LAMBDA", "Round", "effective_lambda", "plan_rounds"]

LARGEST_EFFECTIVE_LAMBDA = 4.0
"""How far extrapolation goes without a word: several rounds beyond it are allowed only on request,
and one beyond it without a gate gets a caution. Measured on the miniature without a gate, an
effective λ of 4 still has more accuracy than the reference, and λ = 5 less (docs/results.md)."""


@dataclass(frozen=True)
class Round:
    """One realignment of the original reference.

    Attributes:
        number: From 1.
        aligned: Path or name of the aligned model of this round.
        output: Folder of its result, a complete model.
    """

    number: int
    aligned: str
    output: Path


def plan_rounds(aligned: str, output: str | Path, rounds: int) -> list[Round]:
    """Lay out the rounds: round i takes the result of round i−1 as the aligned model.

    The last one writes to `output`, the others to ``output/round-1``, ``output/round-2``, ….
    """
    output = Path(output)
    folders = [output / f"round-{number}" for number in range(1, rounds)] + [output]
    teachers = [aligned, *map(str, folders[:-1])]
    return [
        Round(number, teacher, folder)
        for number, (teacher, folder) in enumerate(zip(teachers, folders, strict=True), start=1)
    ]


def effective_lambda(lam: Any, rounds: int, *, extrapolate: bool = False) -> float:
    """What λ several rounds amount to in exact algebra: λ^rounds.

    With h the logits, a round gives r + λ(a − r); the next one, with that in the place of a, gives
    r + λ²(a − r). A schedule counts by its end value.

    Args:
        lam: A number or a schedule.
        rounds: How many.
        extrapolate: Allow several rounds beyond `LARGEST_EFFECTIVE_LAMBDA`.

    Raises:
        ConfigError: If it is beyond that and not allowed. A single round takes any λ.
    """
    end = Schedule.parse(lam).end_value
    effective = float(end**rounds)
    if rounds > 1 and abs(effective) > LARGEST_EFFECTIVE_LAMBDA and not extrapolate:
        raise ConfigError(
            f"{rounds} rounds at λ={end:g} amount to λ={effective:g}, beyond "
            f"{LARGEST_EFFECTIVE_LAMBDA:g}, where models usually break; take fewer rounds or a "
            "smaller λ, or allow it with --extrapolate."
        )
    return effective
