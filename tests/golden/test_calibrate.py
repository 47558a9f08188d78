"""`calibrate` on answers that are all stored: the calibration as it was recorded.

To record it again: FLEXALIGN_GOLDEN=record python -m pytest tests/golden
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from golden.answers import Setting, Task, write_results

TASK = Task("asked", 60)


def ways(measure: str = "answer_probability", fastest: float = 60) -> list[Setting]:
    """λ = 0, and the fast answer of an adaptive dial."""
    words = "adaptive 0" if measure == "answer_probability" else f"adaptive 0 measure={measure}"
    policy = {"policy": "adaptive", "threshold": 0.0, "measure": measure}
    return [
        Setting("λ=0", 0.62, 430, 0.0),
        Setting(words, 0.5, fastest, policy=policy, fast=0.9),
    ]


def lambdas(lams: Sequence[float], hole: float | None = None) -> list[Setting]:
    """A grid of λ, with fewer tokens the larger λ is; one of them may be hardly ever right."""
    return [
        Setting(f"λ={lam:g}", 0.1 if lam == hole else 0.62 - 0.1 * lam, 430 - 200 * lam, lam)
        for lam in lams
    ]


EIGHTHS = [step / 8 for step in range(9)]
DEEPER = [-0.5, -0.375, -0.25, -0.125]
CASES: dict[str, tuple[Sequence[object], int, Mapping[str, list[Setting]]]] = {
    "fast": ((), 1, {"ways": ways()}),
    "deeper": (
        ("--dial", "adaptive", "--lambda-range", "-0.5,1", "--margin", 0.05),
        2,
        {"ways": [*lambdas(DEEPER), *ways()]},
    ),
    "least": (
        ("--dial", "adaptive", "--measure", "min_token_probability"),
        2,
        {"ways": ways("min_token_probability")},
    ),
    "slow": ((), 1, {"ways": ways(fastest=350), "lambdas": lambdas(EIGHTHS)}),
    "hole": (
        ("--dial", "lambda", "--lambda-range", "-0.5,1"),
        2,
        {"lambdas": lambdas([*DEEPER, *EIGHTHS], hole=0.5)},
    ),
}


@pytest.fixture
def stored(run_cli, tmp_path: Path) -> Callable[..., list[object]]:
    """Write all answers that a calibration would draw; returns its command line."""

    def write(
        options: Sequence[object], samples: int, sweeps: Mapping[str, list[Setting]]
    ) -> list[object]:
        questions = TASK.write(tmp_path)
        asked = ["--task", questions, "--samples", samples]
        limits = ["--lambda-range", "-0.5,1"] if "--lambda-range" in options else []
        for seed, (name, settings) in enumerate(sweeps.items(), start=20):
            lams = ",".join(f"{s.lam:g}" for s in settings if s.lam is not None)
            policies = [
                word
                for setting in settings
                if setting.policy is not None
                for word in ("--policy", json.dumps(setting.policy))
            ]
            dry = run_cli(
                *("evaluate", "dial=dial:miniature,miniature:fast", *asked, *limits),
                *(f"--lambda={lams}", *policies, "--dry-run", "--json"),
            )
            assert dry.exit_code == 0, dry.stderr
            write_results(
                tmp_path / "out" / name,
                {"dial": settings},
                [TASK],
                samples,
                seed=seed,
                configuration=json.loads(dry.stdout)["configuration"],
            )
        return [
            *("calibrate", "miniature", "--adapter", "miniature:fast", *asked, *options),
            *("--output", tmp_path / "out", "--save-to", tmp_path / "fast"),
        ]

    return write


@pytest.mark.parametrize("name", CASES)
def test_what_each_effort_costs_and_gets_right(run_cli, stored, tmp_path, golden, name):
    command = stored(*CASES[name])
    samples = {path: path.read_bytes() for path in tmp_path.rglob("samples.jsonl")}
    result = run_cli(*command)
    assert result.exit_code == 0, result.stderr
    assert {path: path.read_bytes() for path in samples} == samples
    written = json.loads((tmp_path / "fast" / "inra_config.json").read_text(encoding="utf-8"))
    calibration = written["calibration"]
    del calibration["flexalign"], calibration["parts"]  # the version; paths and fingerprints
    largest = calibration["effort"]["lambdas"][-1][0]
    efforts = ",".join(f"{effort:g}" for effort in (0, 7.5, 25, 33.25, 50, 80, 99, 100, largest))
    if largest == 100:
        efforts = efforts.removesuffix(",100")
    settings = run_cli(
        *("evaluate", f"dial:miniature,{tmp_path / 'fast'}", "--task", tmp_path / "asked.jsonl"),
        *("--effort", efforts, "--dry-run", "--json"),
    )
    assert settings.exit_code == 0, settings.stderr
    golden(
        f"calibrate-{name}",
        {
            "calibration": calibration,
            "lambda_range": written["lambda_range"],
            "printed": [line.rstrip() for line in result.stdout.splitlines()],
            "settings": json.loads(settings.stdout)["configuration"]["systems"][0]["settings"],
        },
    )


def test_a_dial_that_saves_nothing_is_refused_with_its_figures(run_cli, stored, golden):
    longer = [Setting(f"λ={lam:g}", 0.6, 300 + 100 * lam, lam) for lam in EIGHTHS]
    result = run_cli(*stored(("--dial", "lambda"), 1, {"lambdas": longer}))
    assert result.exit_code == 2
    assert "no setting of this dial saves tokens beyond chance" in result.stderr
    golden("calibrate-refused", {"error": result.stderr.splitlines()[-1]})
