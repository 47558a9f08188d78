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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _miniature_report import GATE, JUDGED, publish, report

RAW = Path("benchmarks/results/miniature.json")

QUESTION_SEED = 20_000
CONFIDENCE = 0.95


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

    from flexalign.miniature import ALIGNED, REFERENCE, make_questions
    from flexalign.miniature.demo import load_pair, measure, respond
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

    from flexalign.fusion import fuse
    from flexalign.miniature import ALIGNED, REFERENCE, make_questions
    from flexalign.miniature.closed_form import expected_outcome, token_level
    from flexalign.miniature.demo import Training, load_pair, measure, realign, respond
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
    from flexalign.statistics import simultaneous_interval

    low, middle, high = simultaneous_interval(
        student.values - pair.values, pair.questions, len(JUDGED), CONFIDENCE
    )
    return {"mean": middle, "low": low, "high": high}


def _logits(model: Any) -> Any:
    return lambda ids, attention: model(input_ids=ids, attention_mask=attention).logits


def _placebo(options: dict[str, Any]) -> Any:
    from flexalign.models.loading import load_model

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
