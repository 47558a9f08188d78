"""Measures systems: tasks, samples, grades, summaries and plots.

The names below are imported on first use, so that modules without torch can be imported without it.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names

if TYPE_CHECKING:
    from flexalign.evaluation.grading import Answered, Grade, Grader, grade
    from flexalign.evaluation.samples import Samples
    from flexalign.evaluation.summary import Summary, compare
    from flexalign.evaluation.sweep import SweepResult, evaluate, regrade
    from flexalign.evaluation.tasks import load_task

_HOMES = {
    "Answered": "flexalign.evaluation.grading",
    "Grade": "flexalign.evaluation.grading",
    "Grader": "flexalign.evaluation.grading",
    "Samples": "flexalign.evaluation.samples",
    "Summary": "flexalign.evaluation.summary",
    "SweepResult": "flexalign.evaluation.sweep",
    "compare": "flexalign.evaluation.summary",
    "evaluate": "flexalign.evaluation.sweep",
    "grade": "flexalign.evaluation.grading",
    "load_task": "flexalign.evaluation.tasks",
    "regrade": "flexalign.evaluation.sweep",
}

__all__ = [
    "Answered",
    "Grade",
    "Grader",
    "Samples",
    "Summary",
    "SweepResult",
    "compare",
    "evaluate",
    "grade",
    "load_task",
    "regrade",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
