"""Choosing a setting of the dial, with a promise about what it costs."""

from flexalign.calibration.effort import effort_to_dial
from flexalign.calibration.goals import Goal, NonInferiority, TokenBudget
from flexalign.calibration.power import Plan, VarianceModel, plan
from flexalign.calibration.tune import Tuned, TuneOptions, tune
from flexalign.evaluation.samples import Ask, Outcomes

__all__ = [
    "Ask",
    "Goal",
    "NonInferiority",
    "Outcomes",
    "Plan",
    "TokenBudget",
    "TuneOptions",
    "Tuned",
    "VarianceModel",
    "effort_to_dial",
    "plan",
    "tune",
]
