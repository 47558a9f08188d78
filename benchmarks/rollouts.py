"""On-policy TrRa in the miniature: which of the two closed forms does each objective land on?

    python benchmarks/rollouts.py                      # about forty minutes on one core
    python benchmarks/rollouts.py --only 5 --gate 0.01 # one setting
    python benchmarks/rollouts.py --students sampled   # of each setting one student
    python benchmarks/rollouts.py --quick              # a few minutes, few steps, nothing kept
    python benchmarks/rollouts.py --rewrite            # only write the stored settings' table again

At each setting four students: *data* learns from the data's responses, *token* from its own with
the divergence to equation 5 at every token, *sampled* from its own with the reward of each sampled
token alone (all from the reference, with equal steps), *sequence* goes on from *data* with as many
steps on its own responses and the reverse KL of whole responses.
Each is read off at every branch of its own responses, and held against what the pair itself makes
of equation 5 there, and of the optimum over whole responses. Every finished setting is kept.
"""

import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from flexalign.fusion import fuse
from flexalign.miniature import ALIGNED, REFERENCE, make_questions
from flexalign.miniature.closed_form import (
    expected_outcome,
    sequence_level_outcome,
    token_level,
)
from flexalign.miniature.demo import Training, load_pair, measure, realign, respond
from flexalign.miniature.measure import BranchValues, branch_probabilities
from flexalign.statistics import clustered_interval

RAW = Path("benchmarks/results/rollouts.json")
REPORT = Path("benchmarks/results/rollouts.md")
OFF_POLICY = Path("benchmarks/results/miniature.json")
QUESTION_SEED = 20_000
JUDGED = ("again", "check", "error")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Setting:
    """One teacher."""

    lam: float
    gate: float | None


STUDENTS = ("data", "token", "sampled", "sequence")
SETTINGS = [Setting(lam, gate) for lam in (2.0, 5.0) for gate in (None, 0.01)]


def run(setting: Setting, students: Sequence[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Train and read off the students of one setting that are asked for."""
    _, aligned, _ = load_pair()
    off = Training(steps=options["steps"])
    on = replace(off, rollouts=1.0)
    rows: list[dict[str, Any]] = []
    start = None
    for name, training in (
        ("data", off),
        ("token", on),
        ("sampled", replace(on, rollout_objective="sampled")),
        ("sequence", replace(on, rollout_objective="sequence", seed=1)),
    ):
        if name not in students:
            continue
        with TemporaryDirectory() as scratch:
            student = realign(
                aligned,
                setting.lam,
                Path(scratch),
                training,
                gate=setting.gate,
                start=start if name == "sequence" else None,
            )
        if name == "data":
            start = copy.deepcopy(student)
        rows.append({"student": name, **asdict(setting), **read_off(student, setting, options)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def read_off(student: Any, setting: Setting, options: dict[str, Any]) -> dict[str, Any]:
    """What a student does, its habits at its own branches, and the two forms of the pair there."""
    reference, aligned, tokenizer = load_pair()
    lam, gate = setting.lam, setting.gate
    questions = make_questions(options["questions"], QUESTION_SEED)
    traces = respond(student, tokenizer, questions, seed=1)
    measured = measure("", questions, traces, token_level(REFERENCE, ALIGNED, lam, gate))
    models = {"student": student, "reference": reference, "aligned": aligned}

    def logits(name: str) -> Any:
        return lambda ids, mask: models[name](input_ids=ids, attention_mask=mask).logits

    def fused(ids: Any, mask: Any) -> Any:
        return fuse(logits("reference")(ids, mask), logits("aligned")(ids, mask), lam, gate)

    few = slice(options["judged"])
    walked = branch_probabilities(
        {**{name: logits(name) for name in models}, "token": fused},
        tokenizer,
        questions[few],
        traces[few],
    )
    ahead = math.log(
        passes_ahead(walked["reference"]["again"], walked["aligned"]["again"], setting)
    )
    judged = {}
    for habit in JUDGED:
        own, token = (walked[name][habit] for name in ("student", "token"))
        shift = 0.0 if habit == "error" else ahead
        sequence = 1 / (1 + (1 - token.values) / token.values * math.exp(-shift))
        judged[habit] = {
            "student": own.mean,
            "token": token.mean,
            "sequence": float(sequence.mean()),
            "student_minus_token": _departure(own.values - token.values, own.questions),
            "student_minus_sequence": _departure(own.values - sequence, own.questions),
        }
    return {
        "accuracy": [measured.accuracy, *measured.accuracy_interval],
        "tokens": [measured.tokens, *measured.tokens_interval],
        "habits": judged,
    }


def passes_ahead(reference: BranchValues, aligned: BranchValues, setting: Setting) -> float:
    """G of :mod:`flexalign.miniature.closed_form`: what all passes to come weigh, after one.

    The optimum over whole responses multiplies the odds that equation 5 gives to `check` and to
    `again` by G, and leaves those of `error`. Of the pair's own branches G takes the mean weights;
    what the two models differ by elsewhere is left out.
    """
    differ = np.abs(aligned.values - reference.values) > (setting.gate or -1.0)
    lam = np.where(differ, setting.lam, np.clip(setting.lam, 0, 1))
    goes_on = reference.values ** (1 - lam) * aligned.values**lam
    stops = (1 - reference.values) ** (1 - lam) * (1 - aligned.values) ** lam
    return float(stops.mean() / (1 - goes_on.mean()))


def _departure(values: Any, questions: Any) -> list[float]:
    """Low, mean and high, simultaneous over the habits."""
    each = 1 - (1 - CONFIDENCE) / len(JUDGED)
    return list(clustered_interval(values, questions, confidence=each))


def report(stored: dict[str, Any]) -> str:
    """The results document."""
    options, rows = stored["options"], stored["rows"]
    lines = [
        "# On-policy TrRa, in the miniature",
        "",
        f"`python benchmarks/rollouts.py`: {options['steps']} steps of 24 responses each "
        "(*sequence*: as many more, from *data*), one seed; "
        f"{options['questions']} questions, temperature 1. Habits: read off at the branches of the "
        f"student's own responses to {options['judged']} of them. *Token form*: equation 5 over "
        "the pair's own probabilities there; *sequence form*: the optimum over whole responses. "
        "Brackets: simultaneous 95 % intervals over r, c and ε.",
    ]
    for habit, symbol in (("again", "r"), ("check", "c"), ("error", "ε")):
        lines += [
            "",
            f"| λ | gate | student | {symbol} | token form | sequence form | student − token form "
            "| student − sequence form |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            values = row["habits"][habit]
            lines.append(
                f"{_setting(row)} | {values['student']:.3f} | {values['token']:.3f} "
                f"| {values['sequence']:.3f} | {_bracket(values['student_minus_token'], 4, '+')} "
                f"| {_bracket(values['student_minus_sequence'], 4, '+')} |"
            )
    lines += [
        "",
        "*At equal tokens*: what students that learned from the data reach with so many tokens, under "
        "the same gate (interpolated between those of `benchmarks/miniature.py`). *World*: the closed "
        "form over the world's habits, of the form that the objective aims at.",
        "",
        "| λ | gate | student | accuracy | at equal tokens | world | tokens | world |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        world = _world(row)
        lines.append(
            f"{_setting(row)} | {_bracket(row['accuracy'], 3)} | {_off_policy(row):.3f} "
            f"| {world.accuracy:.3f} | {_bracket(row['tokens'], 1)} | {world.tokens:.1f} |"
        )
    return "\n".join([*lines, ""])


def _place(row: dict[str, Any]) -> tuple[float, float, int]:
    return row["lam"], row["gate"] or 0, STUDENTS.index(row["student"])


def _setting(row: dict[str, Any]) -> str:
    return f"| {row['lam']:g} | {'–' if row['gate'] is None else row['gate']} | {row['student']}"


def _bracket(interval: Sequence[float], digits: int, sign: str = "") -> str:
    """Write low, mean and high, in whatever order they come."""
    low, mean, high = (f"{value:{sign}.{digits}f}" for value in sorted(interval))
    return f"{mean} [{low}, {high}]"


def _world(row: dict[str, Any]) -> Any:
    pair = REFERENCE, ALIGNED, row["lam"], row["gate"]
    if row["student"] == "sequence":
        return sequence_level_outcome(*pair)
    return expected_outcome(token_level(*pair))


def _off_policy(row: dict[str, Any]) -> float:
    stored = json.loads(OFF_POLICY.read_text(encoding="utf-8"))
    points = sorted(
        (other["tokens"], other["accuracy"])
        for other in stored["students"]
        if other["source"] == "aligned"
        and other["rounds"] == 1
        and (other["lambda"] <= 1 or other["gate"] == row["gate"])
    )
    return float(np.interp(row["tokens"][0], *zip(*points, strict=True)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for, and write the table of all that is stored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 steps, 200 questions")
    parser.add_argument("--only", type=float, help="this λ alone")
    parser.add_argument("--gate", type=float, help="with --only: under this gate (none: plain)")
    parser.add_argument("--students", nargs="*", default=STUDENTS, choices=STUDENTS)
    parser.add_argument("--rewrite", action="store_true", help="only write the table again")
    chosen = parser.parse_args(arguments)
    if "sequence" in chosen.students and "data" not in chosen.students:
        parser.error("sequence goes on from data; give --students data sequence.")
    torch.set_num_threads(1)
    options = {
        "steps": 10 if chosen.quick else 150,
        "questions": 200 if chosen.quick else 2000,
        "judged": 200 if chosen.quick else 1000,
    }
    stored = {"options": options, "rows": []}
    if RAW.is_file() and not chosen.quick:
        stored = json.loads(RAW.read_text(encoding="utf-8"))
    settings = [] if chosen.rewrite else SETTINGS
    if chosen.only is not None:
        settings = [Setting(chosen.only, chosen.gate)]
    for setting in settings:
        rows = run(setting, chosen.students, options)
        if RAW.is_file() and not chosen.quick:  # another process may have added to it
            stored = json.loads(RAW.read_text(encoding="utf-8"))
        kept = [
            row
            for row in stored["rows"]
            if Setting(row["lam"], row["gate"]) != setting or row["student"] not in chosen.students
        ]
        stored["rows"] = sorted([*kept, *rows], key=_place)
        if not chosen.quick:
            text = json.dumps(stored, indent=1, ensure_ascii=False) + "\n"
            RAW.write_text(text, encoding="utf-8")
    if chosen.quick:
        print(report(stored))
    else:
        REPORT.write_text(report(stored), encoding="utf-8")


if __name__ == "__main__":
    main()
