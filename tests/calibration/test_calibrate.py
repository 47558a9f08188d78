import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from flexalign.calibration.calibrate import (
    CalibrateOptions,
    _fit,
    measure_cascade,
    measure_dial,
    measure_settings,
    plan_sweeps,
)
from flexalign.calibration.cascade import Cascade
from flexalign.calibration.effort import (
    Calibration,
    copy_adapter,
    effort_to_dial,
    store_calibration,
)
from flexalign.errors import ConfigError, ServingError
from flexalign.evaluation.samples import ResultsFolder, Samples
from flexalign.evaluation.sweep import Sweep
from flexalign.evaluation.tasks import load_task
from flexalign.inra import InRaConfig
from flexalign.lambdas import Adaptive, Fixed, Setting
from flexalign.miniature import folder
from flexalign.systems import SystemOptions, parse_system

SAMPLING = SystemOptions(temperature=1.0, top_p=1.0, max_new_tokens=400, batch_size=64)


def sweeps_of(options, questions, seed=5):
    task = load_task(f"miniature:{seed}", limit=questions)
    return plan_sweeps(parse_system("dial:miniature"), task, options, SAMPLING)


@pytest.mark.slow
def test_the_policy_writes_what_calibration_foretells(tmp_path):
    options = CalibrateOptions()
    sweeps = sweeps_of(options, 48)
    calibration = measure_dial(sweeps, options, tmp_path / "calibration")
    assert calibration.dial == "adaptive"
    assert [level.effort for level in calibration.levels] == [0, 25, 50, 75, 100]
    _, ways = measure_cascade(sweeps["ways"], tmp_path / "calibration" / "ways")
    dial = effort_to_dial(calibration, 50)
    assert isinstance(dial, Adaptive)
    sweep = replace(sweeps["ways"], settings=[Setting.of(dial)])
    assert isinstance(sweep, Sweep)
    sweep.run(tmp_path / "policy")
    rows = sorted(
        ResultsFolder.read(tmp_path / "policy").rows, key=lambda r: (r["question"], r["sample"])
    )
    foretold, fast = ways.tokens(dial.threshold), ways.fast.tokens
    same = [
        wanted - quick <= row["tokens"] <= wanted
        for wanted, quick, row in zip(foretold, fast, rows, strict=True)
    ]
    assert sum(same) >= len(rows) - 1  # one answer may differ where two tokens nearly tie
    line = calibration.levels[2].line
    assert sum(row["tokens"] for row in rows) / len(rows) == pytest.approx(line, rel=0.1)


@pytest.mark.slow
def test_lambda_is_the_dial_where_it_is_asked_for(tmp_path):
    options = CalibrateOptions(dial="lambda", lambda_range=(-0.5, 1.0))
    calibration = measure_dial(sweeps_of(options, 24), options, tmp_path)
    assert calibration.thresholds == ()
    assert calibration.threshold is None
    assert effort_to_dial(calibration, 100) == Fixed(0.0)
    efforts = [effort for effort, _ in calibration.lambdas]
    assert efforts == sorted(efforts)
    assert json.loads(json.dumps(calibration.to_json(), allow_nan=False))["dial"] == "lambda"


def test_the_range_and_the_measure_are_checked_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="leaves no room"):
        CalibrateOptions(lambda_range=(-1.0, 0.0))
    with pytest.raises(ConfigError, match="handful of values"):
        CalibrateOptions(measure="agreement")
    with pytest.raises(ConfigError, match="answers at λ = 1"):
        CalibrateOptions(dial="adaptive", lambda_range=(0.0, 0.5))
    for without_fast in ({"dial": "lambda"}, {"lambda_range": (0.0, 0.5)}):
        with pytest.raises(ConfigError, match=r"min_token_probability.*effort sets λ here"):
            CalibrateOptions(measure="min_token_probability", **without_fast)
    task = load_task("miniature", limit=2)
    with pytest.raises(ConfigError, match="no InRa dial"):
        plan_sweeps(parse_system("pair:miniature"), task, CalibrateOptions(), SAMPLING)


def test_a_calibration_widens_the_range_and_leaves_all_else(tmp_path):
    copy_adapter(folder("fast"), tmp_path / "fast")
    before = InRaConfig.load(tmp_path / "fast")
    calibration = Calibration(((100.0, 0.0),), lambda_range=(-0.5, 0.5))
    store_calibration(tmp_path / "fast", calibration)
    after = InRaConfig.load(tmp_path / "fast")
    stored = json.loads(json.dumps(calibration.to_json()))
    assert after == replace(before, calibration=stored, lambda_range=(-0.5, 1.0))


def test_a_crash_while_writing_leaves_the_old_settings(tmp_path, monkeypatch):
    copy_adapter(folder("fast"), tmp_path / "fast")
    before = InRaConfig.load(tmp_path / "fast")

    def fail(_):
        raise OSError("the power is gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="power"):
        store_calibration(tmp_path / "fast", Calibration(((100.0, 0.0),)))
    assert InRaConfig.load(tmp_path / "fast") == before


class _Sweep:
    """A sweep that was run: `tokens` and grades by setting, one answer to each question."""

    def __init__(self, found, lost=()):
        self.settings = [Setting.of(value) for value in found]
        self._found = list(found.values())
        self._lost = list(lost)

    def run(self, output, **_):
        rows = [
            {"system": "s", "task": "t", "setting": setting.id, "question": str(question)}
            | {"sample": 0, "status": "correct", "tokens": tokens, "route": "fast"}
            | {"confidence": 0.9, "rejected_tokens": 0, "lambda": setting.lam}
            for setting, tokens in zip(self.settings, self._found, strict=True)
            for question in range(4)
        ]
        ResultsFolder.begin(output, {"systems": []}, [], {}).append(rows)
        return SimpleNamespace(lost=self._lost)


def test_lost_samples_stop_a_calibration_with_how_to_go_on(tmp_path):
    lost = [SimpleNamespace(reason="503 down")]
    with pytest.raises(ServingError, match=r"1 samples could not .*503 down.*same command again"):
        measure_settings(_Sweep({0.0: 9}, lost), tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dial": "speed"}, "the dial is auto, adaptive or lambda, not 'speed'"),
        ({"margin": float("nan")}, "margin must be in"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_what_is_out_of_range_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        CalibrateOptions(**given)


def _cascade(fast, slow):
    count = 4
    questions = [str(number) for number in range(count)]
    right, sure = np.ones(count, bool), np.linspace(0.1, 0.9, count)
    return Cascade(
        Samples(questions, right, np.full(count, float(fast)), confidence=sure),
        Samples(questions, right, np.full(count, float(slow))),
    )


def test_efforts_above_100_rise_with_the_tokens_below_lambda_0():
    tokens = {0.0: 50.0, -0.25: 70.0, -0.5: 60.0, -1.0: 90.0}
    _, fitted = _fit(_cascade(10, 50), tokens)
    # 40 tokens are 100 of effort; λ = −0.5 costs less than λ = −0.25 and has no effort
    assert fitted == ((100.0, 0.0), (150.0, -0.25), (200.0, -1.0))
