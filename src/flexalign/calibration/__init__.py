"""Chooses a setting of the dial for which a promise is proved, and calibrates effort."""

from flexalign.calibration.calibrate import CalibrateOptions, calibrate
from flexalign.calibration.constraints import Constraint, NonInferiority, TokenBudget
from flexalign.calibration.effort import Calibration, effort_settings, effort_to_dial
from flexalign.calibration.power import ProofPlan, VarianceModel, plan
from flexalign.calibration.results import Ask
from flexalign.calibration.tune import Tuned, TuneOptions, select_setting, tune, tune_stored

__all__ = [
    "Ask",
    "CalibrateOptions",
    "Calibration",
    "Constraint",
    "NonInferiority",
    "ProofPlan",
    "TokenBudget",
    "TuneOptions",
    "Tuned",
    "VarianceModel",
    "calibrate",
    "effort_settings",
    "effort_to_dial",
    "plan",
    "select_setting",
    "tune",
    "tune_stored",
]
