"""Whether an effort costs what it says, on questions that calibration has not seen.

    python benchmarks/effort.py            # about 2 minutes on one core that is free
    python benchmarks/effort.py --quick    # a fifth of the questions, for a look

The miniature's fast adapter is calibrated on one set of questions. Other questions are answered
fast and slow, and each effort's dial takes one or the other as the policy would (that the policy
itself writes the same answers is a test: tests/calibration/test_calibrate.py). Mean tokens are
held against the straight line between the ends as calibration measured them, and the tokens of each
question against the line between that question's own ends. The report goes to
benchmarks/results/effort.md.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from flexalign.calibration.calibrate import (
    CalibrateOptions,
    measure_cascade,
    measure_dial,
    plan_sweeps,
)
from flexalign.calibration.effort import (
    AchievedRatio,
    EffortLevel,
    SettingMetrics,
    effort_to_dial,
)
from flexalign.evaluation.tasks import load_task
from flexalign.lambdas import Adaptive
from flexalign.systems import SystemOptions, parse_system

REPORT = Path("benchmarks/results/effort.md")
TOLERANCE = 0.1
SAMPLING = SystemOptions(temperature=1.0, top_p=1.0, max_new_tokens=1000, batch_size=256)


class Effort(NamedTuple):
    """An effort as calibrated, and as found anew."""

    level: EffortLevel
    fresh: SettingMetrics
    achieved: AchievedRatio | None


def measure(questions: int, scratch: Path) -> list[Effort]:
    """Calibrate, ask anew, and return each effort as calibrated and as found anew."""
    system = parse_system("dial:miniature")
    task = load_task("miniature:31", limit=questions)
    options = CalibrateOptions()
    sweeps = plan_sweeps(system, task, options, SAMPLING)
    calibration = measure_dial(sweeps, options, scratch / "calibration")
    others = plan_sweeps(system, load_task("miniature:32", limit=questions), options, SAMPLING)
    measured, cascade = measure_cascade(others["ways"], scratch / "fresh")
    fast, slow = (own.by_question(own.tokens) for own in (cascade.at(0.0), cascade.slow))
    table = []
    for level in calibration.levels:
        dial = effort_to_dial(calibration, level.effort)
        taken = measured["λ=0"]
        if isinstance(dial, Adaptive):
            assert dial.threshold is not None
            taken = cascade.at(dial.threshold)
        asked = fast + level.effort / 100 * (slow - fast)
        achieved = AchievedRatio.of(taken.by_question(taken.tokens), asked)
        table.append(Effort(level, SettingMetrics.of(taken), achieved))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the questions")
    arguments = parser.parse_args()
    questions = 300 if arguments.quick else 1500
    with TemporaryDirectory() as scratch:
        table = measure(questions, Path(scratch))
    lines = [
        f"`python benchmarks/effort.py{' --quick' * arguments.quick}`: `miniature:fast` calibrated "
        f"on {questions} questions and held against {questions} others. *Line*: the straight line between the ends as calibrated; *off*: fresh mean tokens against it, to be "
        f"within ±{TOLERANCE:.0%}. *÷ asked*: the tokens of a fresh question by those on the line between "
        "its own fast and slow answer; the median, the tenth and the ninetieth percentile of the questions. "
        "Other brackets: 95 % intervals.",
        "",
        "| effort | setting | line | fresh tokens | off | 10 % | 90 % | ÷ asked | accuracy | "
        "calibrated accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for level, fresh, achieved in table:
        low, tokens, high = fresh.tokens
        least, share, most = fresh.accuracy
        lines.append(
            f"| {level.effort:g} | {level.setting} | {level.line:.1f} | "
            f"{tokens:.1f} [{low:.1f}, {high:.1f}] | {tokens / level.line - 1:+.1%} "
            f"| {fresh.tokens_p10:.0f} | {fresh.tokens_p90:.0f} | {_ratio(achieved)} | "
            f"{share:.3f} [{least:.3f}, {most:.3f}] | {level.metrics.accuracy.mean:.3f} |"
        )
    off = max(abs(fresh.tokens.mean / level.line - 1) for level, fresh, _ in table)
    verdict = "kept" if off <= TOLERANCE else "not kept"
    lines += [
        "",
        f"Farthest from the line: {off:.1%}; the tolerance of {TOLERANCE:.0%} is {verdict}.",
    ]
    print("\n".join(lines))
    REPORT.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _ratio(ratio: AchievedRatio | None) -> str:
    return "—" if ratio is None else f"{ratio.median:.2f} [{ratio.p10:.2f}, {ratio.p90:.2f}]"


if __name__ == "__main__":
    main()
