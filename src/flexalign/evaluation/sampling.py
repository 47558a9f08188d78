"""Which samples a sweep is made of: every question of every task, several times, at each setting."""

from collections.abc import Sequence

from flexalign.data.traces import derive_seed
from flexalign.evaluation.systems import Cell, Setting
from flexalign.evaluation.tasks import Task

__all__ = ["sample_seed", "sweep_cells"]


def sample_seed(seed: int, task: str, question: str, sample: int) -> int:
    """The seed of one sample: 31 bits from the sweep's seed and the sample's place.

    The setting is left out on purpose: all settings answer with the same luck, so that their
    differences are measured with less noise.
    """
    return derive_seed(seed, task, question, sample)


def sweep_cells(
    tasks: Sequence[Task], settings: Sequence[Setting], samples: int, seed: int = 0
) -> list[Cell]:
    """List a system's samples, by task, question, sample and setting."""
    return [
        Cell(
            setting,
            task.name,
            question.id,
            sample,
            sample_seed(seed, task.name, question.id, sample),
            task.messages(question),
        )
        for task in tasks
        for question in task.questions
        for sample in range(samples)
        for setting in settings
    ]
