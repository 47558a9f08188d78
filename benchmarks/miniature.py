"""The miniature's results: TrRa and TrRa-iter against two closed forms, with a placebo beside.

    python benchmarks/miniature.py                      # about half an hour on two cores
    python benchmarks/miniature.py --quick              # a few minutes, wide intervals

For every setting three layers are set side by side: the *world's* form (its habits put into
equation 5), the *pair's own* form (the two models' fused probabilities, teacher-forced at every
branch, no sampling) and the *student*. Training is judged by the student against the pair's own
form, on the student's own responses; what separates the pair's form from the world's is the pair's.
"""

import argparse
import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _document import put_section

RAW = Path("benchmarks/results/miniature.json")

GATE = 0.01
QUESTION_SEED = 20_000
JUDGED = ("again", "check", "error")
CONFIDENCE = 0.95
MARGIN = 0.01


@dataclass(frozen=True)
class Job:
    """One chain of realignments: `rounds` students, each from the reference."""

    source: str
    lam: float
    gate: float | None = None
    rounds: int = 1


JOBS = [
    Job("aligned", 2.0, None, rounds=3),
    Job("aligned", 2.0, GATE, rounds=3),
    *[Job("aligned", lam) for lam in (0.5, 1.0, 1.5, 5.0, 10.0)],
    *[Job("aligned", lam, GATE) for lam in (1.5, 5.0, 10.0)],
    *[Job("placebo", lam) for lam in (2.0, 5.0)],
    Job("placebo", 5.0, GATE),
]


def run_models(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The untrained rows: reference, aligned and placebo, as they are."""
    import torch

    from flexalign.evaluation.showcase import load_pair, measure, respond
    from flexalign.miniature import ALIGNED, REFERENCE, make_questions
    from flexalign.miniature.measure import branch_probabilities, mean_habits

    torch.set_num_threads(1)
    reference, aligned, tokenizer = load_pair()
    questions = make_questions(options["model_questions"], QUESTION_SEED)
    rows = []
    for name, model, habits in (
        ("reference", reference, REFERENCE),
        ("aligned", aligned, ALIGNED),
        ("placebo", _placebo(options), REFERENCE),
    ):
        traces = respond(model, tokenizer, questions, seed=1)
        measurement = measure(name, questions, traces, habits)
        few = slice(options["judged_questions"])
        forced = branch_probabilities(
            {name: _logits(model)}, tokenizer, questions[few], traces[few]
        )
        rows.append({**measurement.to_json(), "forced_habits": asdict(mean_habits(forced[name]))})
    return rows


def run_job(job: Job, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Train, measure and judge every student of one chain."""
    import torch

    from flexalign.evaluation.showcase import Training, load_pair, measure, realign, respond
    from flexalign.fusion import fuse
    from flexalign.miniature import ALIGNED, REFERENCE, make_questions
    from flexalign.miniature.closed_form import expected_outcome, token_level
    from flexalign.miniature.measure import branch_probabilities, mean_habits

    torch.set_num_threads(1)
    reference, aligned, tokenizer = load_pair()
    towards = aligned if job.source == "aligned" else _placebo(options)
    questions = make_questions(options["questions"], QUESTION_SEED)
    training = Training(steps=options["steps"], divergence=options["divergence"])
    rows = []
    for round_ in range(1, job.rounds + 1):
        with TemporaryDirectory() as scratch:
            student = realign(towards, job.lam, Path(scratch), training, gate=job.gate)
        traces = respond(student, tokenizer, questions, seed=1)
        world = (
            token_level(REFERENCE, ALIGNED, job.lam**round_, job.gate)
            if job.source == "aligned"
            else REFERENCE
        )
        measurement = measure(_name(job, round_), questions, traces, world)

        def teacher(ids: Any, attention: Any, towards: Any = towards) -> Any:
            pair = (_logits(model)(ids, attention) for model in (reference, towards))
            return fuse(*pair, job.lam, job.gate)

        few = slice(options["judged_questions"])
        forced = branch_probabilities(
            {"student": _logits(student), "pair": teacher}, tokenizer, questions[few], traces[few]
        )
        own = mean_habits(forced["pair"])
        rows.append(
            {
                **measurement.to_json(),
                "source": job.source,
                "lambda": job.lam,
                "gate": job.gate,
                "rounds": round_,
                "pair_habits": asdict(own),
                "pair_outcome": asdict(expected_outcome(own)),
                "student_forced_habits": asdict(mean_habits(forced["student"])),
                "departure": {
                    habit: _departure(forced["student"][habit], forced["pair"][habit])
                    for habit in JUDGED
                },
            }
        )
        towards = student
    return rows


def _departure(student: Any, pair: Any) -> dict[str, float]:
    """Student minus pair at the same branches, with a simultaneous interval over the habits."""
    from flexalign.evaluation.statistics import clustered_interval

    each = 1 - (1 - CONFIDENCE) / len(JUDGED)
    low, middle, high = clustered_interval(
        student.values - pair.values, pair.questions, confidence=each
    )
    return {"mean": middle, "low": low, "high": high}


def _logits(model: Any) -> Any:
    return lambda ids, attention: model(input_ids=ids, attention_mask=attention).logits


def _placebo(options: dict[str, Any]) -> Any:
    from flexalign.loading import load_model

    return load_model(options["placebo"])


def _name(job: Job, round_: int) -> str:
    name = f"λ={job.lam:g}" if job.source == "aligned" else f"placebo λ={job.lam:g}"
    if round_ > 1:
        name += f", round {round_}"
    return name + (f", τ={job.gate:g}" if job.gate is not None else "")


def build_placebo(folder: Path) -> None:
    """Train the control on from the shipped reference, if it is not there yet."""
    import torch
    from transformers import AutoModelForCausalLM

    from flexalign.miniature import folder as part
    from flexalign.miniature.build import PLACEBO_SCHOOLING, teach

    if (folder / "model.safetensors").is_file():
        return
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(part("reference"))
    teach(model, PLACEBO_SCHOOLING, seed=2)
    model.save_pretrained(folder)


def report(rows: dict[str, list[dict[str, Any]]], options: dict[str, Any]) -> str:
    """The section of the results document."""
    models = rows["models"]
    students = sorted(rows["students"], key=_place_in_table)
    reference = models[0]
    base = reference["tokens"]
    lines = [
        f"`python benchmarks/miniature.py`: {options['model_questions']} questions for each model as it is, "
        f"{options['questions']} for each student, temperature 1, no truncation; "
        f"students: {options['steps']} steps of 24, {options['divergence']} divergence. "
        "Brackets: 95 % intervals.",
        "",
        "**The pair** beside the world that it was trained on:",
        "",
        "| model | accuracy | world | tokens | world | r | world | c | world | ε | world |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in models:
        forced, world = row["forced_habits"], row["expected_habits"]
        lines.append(
            f"| {row['name']} | {_share(row)} | {row['expected']['accuracy']:.3f} "
            f"| {row['tokens']:.1f} | {row['expected']['tokens']:.1f} "
            + "".join(f"| {forced[h]:.3f} | {world[h]:.3f} " for h in JUDGED)
            + "|"
        )
    lines += [
        "",
        "**Students.** *World*: equation 5 over the world's habits. *Pair*: the pair's own form. "
        "`token cut` is against the reference's measured tokens.",
        "",
        "| setting | accuracy | world | pair | tokens | world | pair | token cut "
        "| r student / pair / world |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in [reference, models[1], *students]:
        pair = row.get("pair_outcome")
        habits = row.get("student_forced_habits") or row["forced_habits"]
        again = [habits, row.get("pair_habits"), row["expected_habits"]]
        lines.append(
            f"| {row['name']} | {_share(row)} | {row['expected']['accuracy']:.3f} "
            f"| {_number(pair, 'accuracy', 3)} | {row['tokens']:.1f} "
            f"| {row['expected']['tokens']:.1f} | {_number(pair, 'tokens', 1)} "
            f"| {1 - row['tokens'] / base:.1%} "
            f"| {' / '.join(_number(h, 'again', 3) for h in again)} |"
        )
    lines += [
        "",
        f"**Student minus pair** at the same branches of the student's own responses "
        f"({options['judged_questions']} questions), simultaneous 95 % intervals over the three "
        f"habits; *equivalent*: all three within ±{MARGIN:g}.",
        "",
        "| setting | r | c | ε | equivalent |",
        "|---|---|---|---|---|",
    ]
    for row in students:
        departure = row["departure"]
        inside = all(
            departure[h]["low"] >= -MARGIN and departure[h]["high"] <= MARGIN for h in JUDGED
        )
        lines.append(
            f"| {row['name']} "
            + "".join(
                f"| {departure[h]['mean']:+.4f} [{departure[h]['low']:+.4f}, "
                f"{departure[h]['high']:+.4f}] "
                for h in JUDGED
            )
            + f"| {'yes' if inside else 'no'} |"
        )
    return "\n".join([*lines, "", "![Accuracy against tokens](pictures/miniature.png)", ""])


def _place_in_table(row: dict[str, Any]) -> tuple[bool, bool, int, float]:
    return row["source"] != "aligned", row["gate"] is not None, row["rounds"], row["lambda"]


def _share(row: dict[str, Any]) -> str:
    low, high = row["accuracy_interval"]
    return f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def _number(values: dict[str, float] | None, key: str, digits: int) -> str:
    if values is None or math.isnan(values[key]):
        return "–"
    return f"{values[key]:.{digits}f}"


def draw(rows: dict[str, list[dict[str, Any]]]) -> None:
    """The picture of the results document."""
    from flexalign.evaluation.pareto import ParetoPoint, draw_pareto
    from flexalign.evaluation.showcase import closed_form_curve

    def group(row: dict[str, Any]) -> str:
        if "source" not in row:
            return "the pair"
        if row["source"] == "placebo":
            return "placebo"
        kind = "TrRa" if row["rounds"] == 1 else "TrRa-iter"
        return kind + (", gated" if row["gate"] else "")

    points = [
        ParetoPoint(
            row["name"].split(", τ")[0].replace("placebo ", ""),
            group(row),
            row["tokens"],
            tuple(row["tokens_interval"]),
            row["accuracy"],
            tuple(row["accuracy_interval"]),
        )
        for row in rows["models"] + rows["students"]
    ]
    curves = [closed_form_curve(), closed_form_curve(GATE)]
    named = {point.label: point for point in points}
    ends = [(named["reference"], named["aligned"])]
    draw_pareto(Path("docs/pictures/miniature.png"), points, curves, "The miniature: TrRa", ends)


def publish(rows: dict[str, list[dict[str, Any]]], options: dict[str, Any]) -> None:
    """Draw the picture and put the section between its marks in the results document."""
    draw(rows)
    put_section("miniature", report(rows, options))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="300 questions, 60 steps")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--divergence", default="reverse")
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rewrite", action="store_true", help="only write the last run's report")
    parser.add_argument("--placebo", type=Path, default=Path("out/placebo"))
    chosen = parser.parse_args(arguments)
    if chosen.rewrite:
        stored = json.loads(RAW.read_text(encoding="utf-8"))
        publish(stored, stored["options"])
        return
    options = {
        "questions": 300 if chosen.quick else chosen.questions,
        "model_questions": 300 if chosen.quick else 3 * chosen.questions,
        "judged_questions": 300 if chosen.quick else 1500,
        "steps": 60 if chosen.quick else chosen.steps,
        "divergence": chosen.divergence,
        "placebo": str(chosen.placebo),
    }
    with ProcessPoolExecutor(chosen.workers, mp_context=get_context("spawn")) as pool:
        placebo = pool.submit(build_placebo, chosen.placebo)
        results = [pool.submit(run_job, job, options) for job in JOBS if job.source == "aligned"]
        placebo.result()
        models = pool.submit(run_models, options)
        results += [pool.submit(run_job, job, options) for job in JOBS if job.source == "placebo"]
        students = []
        for result in results:
            students += result.result()
            print(f"{students[-1]['name']} done", flush=True)
        rows = {"models": models.result(), "students": students}
    if chosen.quick:
        print(report(rows, options))
        return
    RAW.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"options": options, **rows}, indent=1, ensure_ascii=False) + "\n"
    RAW.write_text(text, encoding="utf-8")
    publish(rows, options)


if __name__ == "__main__":
    main()
