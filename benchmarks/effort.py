"""Whether an effort costs what it says, on questions that calibration has not seen.

    python benchmarks/effort.py            # about 6 minutes on one core
    python benchmarks/effort.py --quick    # a tenth of the questions, for a look

The miniature's fast adapter is calibrated on one set of questions. Then the policies themselves
answer other questions at effort 0, 25, 50, 75 and 100, and their mean tokens are held against the
straight line between the ends as calibration measured them. The report goes to
benchmarks/results/effort.md.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from flexalign.calibration.calibrate import CalibrateOptions, calibrate, plan_sweeps
from flexalign.calibration.effort import effort_to_dial
from flexalign.calibration.figures import LEVELS, Answers, figures
from flexalign.evaluation.samples import ResultsFolder
from flexalign.evaluation.sweep import Sweep
from flexalign.evaluation.systems import Setting, SystemOptions, parse_system
from flexalign.evaluation.tasks import load_task

REPORT = Path("benchmarks/results/effort.md")
TOLERANCE = 0.1
SAMPLING = SystemOptions(temperature=1.0, top_p=1.0, max_new_tokens=1000, batch_size=256)


def measure(questions: int, fresh: int, scratch: Path) -> list[dict[str, Any]]:
    """Calibrate, ask anew, and return a row for each effort."""
    system = parse_system("dial:miniature")
    task = load_task("miniature:31", limit=questions)
    options = CalibrateOptions()
    sweeps = plan_sweeps(system, task, options, SAMPLING)
    calibration = calibrate(sweeps, options, scratch / "calibration")
    settings = [Setting.of(effort_to_dial(calibration, effort)) for effort in LEVELS]
    sweep = Sweep(
        [system], [load_task("miniature:32", limit=fresh)], settings, 1, 1, options=SAMPLING
    )
    sweep.run(scratch / "fresh")
    rows = ResultsFolder.read(scratch / "fresh").rows
    table = []
    for level, setting in zip(calibration["levels"], settings, strict=True):
        own = [row for row in rows if row["setting"] == setting.id]
        answers = Answers(
            [row["question"] for row in own],
            np.array([row["tokens"] for row in own], dtype=np.float64),
            np.array([row["status"] == "correct" for row in own]),
        )
        slow = float(np.mean([row["route"] in (None, "slow") for row in own]))
        table.append({"level": level, "slow": slow, **figures(answers)})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the questions")
    arguments = parser.parse_args()
    questions, fresh = (300, 200) if arguments.quick else (3000, 2000)
    with TemporaryDirectory() as scratch:
        table = measure(questions, fresh, Path(scratch))
    lines = [
        f"`python benchmarks/effort.py{' --quick' * arguments.quick}`: `miniature:fast` calibrated "
        f"on {questions} questions, its policies then asked {fresh} others, once each. *Line*: the "
        "straight line between the ends as calibrated; *off*: fresh mean tokens against it, to be "
        f"within ±{TOLERANCE:.0%}. Brackets: 95 % intervals.",
        "",
        "| effort | setting | line | fresh tokens | off | 10 % | 90 % | slow | accuracy | "
        "calibrated accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        level = row["level"]
        low, high = row["tokens_ci"]
        least, most = row["accuracy_ci"]
        lines.append(
            f"| {level['effort']:g} | {level['setting']} | {level['line']:.1f} | "
            f"{row['tokens']:.1f} [{low:.1f}, {high:.1f}] | {row['tokens'] / level['line'] - 1:+.1%} "
            f"| {row['tokens_p10']:.0f} | {row['tokens_p90']:.0f} | {row['slow']:.1%} | "
            f"{row['accuracy']:.3f} [{least:.3f}, {most:.3f}] | {level['accuracy']:.3f} |"
        )
    off = max(abs(row["tokens"] / row["level"]["line"] - 1) for row in table)
    verdict = "kept" if off <= TOLERANCE else "not kept"
    lines += [
        "",
        f"Farthest from the line: {off:.1%}; the tolerance of {TOLERANCE:.0%} is {verdict}.",
    ]
    print("\n".join(lines))
    REPORT.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
