"""One LoRA for every λ, beside what it replaces: habits, accuracy and tokens on the miniature.

    python benchmarks/lora_dial.py               # hours on two cores; a stopped run goes on
    python benchmarks/lora_dial.py --seeds 0     # the first of the three seeds alone
    python benchmarks/lora_dial.py --quick       # minutes: few questions and steps
    python benchmarks/lora_dial.py --rewrite     # only write the table of what is stored

At each λ, plain up to 3 and gated up to 5: the LoRA dial, trained once; a student of that λ alone;
the two models themselves, decoded together; their interpolated weights; and a LoRA trained at
λ = 1 and scaled. Training is judged at the branches of the model's own responses: its habits
against the *pair's own form*, the fusion of the two models' probabilities at the same branches.

A cell (method, seed, gate, λ) is stored in ``out/lora_dial`` as soon as it is measured, and the
trained weights beside it. What is there is not made again.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _lora_dial_report import GATE, GATED, JUDGED, PLAIN, publish, report

WORK = Path("out/lora_dial")
QUESTION_SEED = 20_000
CONFIDENCE = 0.95
METHODS = ("dial", "two models", "student", "scaled", "interpolated")


@dataclass(frozen=True)
class Task:
    """One method under one gate and seed: what is trained, and all its settings."""

    method: str
    gate: float | None
    seed: int

    @property
    def lams(self) -> tuple[float, ...]:
        return PLAIN if self.gate is None else GATED

    def cell(self, lam: float) -> str:
        """The name of a setting's file."""
        gate = "plain" if self.gate is None else f"gate={self.gate:g}"
        return f"{self.method.replace(' ', '-')},{gate},seed={self.seed},lambda={lam:g}"


def tasks(seeds: Sequence[int], methods: Sequence[str]) -> list[Task]:
    """All tasks, one seed after the other. What has no training is measured with one seed.

    Interpolated weights and a scaled LoRA know no gate: they have the plain settings, up to 5.
    """
    found = []
    for seed in seeds:
        for method in methods:
            if method in ("two models", "interpolated") and seed != 0:
                continue
            gates = (GATE, None) if method in ("dial", "student", "two models") else (GATE,)
            found += [Task(method, gate, seed) for gate in gates]
    return found


def run(task: Task, options: dict[str, Any]) -> list[str]:
    """Train and measure what is missing of a task; return the names of its new cells."""
    import torch

    torch.set_num_threads(1)
    work = Path(options["work"])
    missing = [lam for lam in task.lams if not (work / f"{task.cell(lam)}.json").is_file()]
    models = _MAKERS[task.method](task, missing, options)
    for lam, model, settings, training in models:
        row = {**asdict(task), "lambda": lam, "training": training}
        row |= measured(model, settings, lam, task, options)
        _store(work / f"{task.cell(lam)}.json", row)
    return [task.cell(lam) for lam in missing]


Made = Iterator[tuple[float, Any, dict[str, Any], dict[str, Any] | None]]
"""λ, the model, the options of its `generate`, and what its training cost."""


def _dial(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """The LoRA dial, trained once for all λ of the task; each λ is then merged."""
    from flexalign.lambdas import LambdaRange

    if lams:
        within = LambdaRange(0, max(task.lams))
        dial, training = _lora(task, within, "dial", options)
        for lam in lams:
            yield lam, dial.merged(lam), {}, training


def _scaled(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """A LoRA trained at λ = 1 alone, whose strength is then λ."""
    if lams:
        dial, training = _lora(task, 1.0, "lora", options)
        for lam in lams:
            yield lam, dial.merged(lam), {}, training


def _lora(task: Task, lam: Any, name: str, options: dict[str, Any]) -> Any:
    """Train a LoRA, or load it if it was trained before; return it with what its training cost."""
    from flexalign.lora_dial import LoRADial
    from flexalign.miniature.demo import Training, load_pair, realign_dial

    gate = None if name == "lora" else task.gate
    folder = Path(options["work"]) / f"{name},gate={gate},seed={task.seed}"
    cost = folder.with_suffix(".json")
    if not cost.is_file():
        training = Training(
            steps=options["dial_steps"] if name == "dial" else options["steps"],
            learning_rate=3e-3,
            by_length=True,
            seed=task.seed,
        )
        aligned = load_pair()[1]
        start = time.process_time()
        realign_dial(aligned, lam, folder, training, gate)
        _store(cost, _cost(training.steps, start))
    dial = LoRADial.from_pretrained("miniature:reference", folder / "dial")
    return dial, json.loads(cost.read_text())


def _students(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """A student of each λ, all weights."""
    from flexalign.miniature.demo import Training, load_pair, realign

    training = Training(steps=options["steps"], by_length=True, seed=task.seed)
    for lam in lams:
        aligned = load_pair()[1]
        with TemporaryDirectory() as scratch:
            start = time.process_time()
            student = realign(aligned, lam, Path(scratch), training, task.gate)
            yield lam, student, {}, _cost(training.steps, start)


def _two_models(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """Both models, fused while they decode."""
    from flexalign import ModelPair, TwoModelDecoder

    decoder = TwoModelDecoder(ModelPair.load("miniature:reference", "miniature:aligned"))
    for lam in lams:
        yield lam, decoder, {"lam": lam, "gate": task.gate}, None


def _interpolated(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """The weights between the two models, and beyond the aligned one."""
    from flexalign import interpolate
    from flexalign.models.loading import load_model

    for lam in lams:
        with TemporaryDirectory() as scratch:
            folder = interpolate(
                "miniature:reference", "miniature:aligned", lam, f"{scratch}/between"
            )
            yield lam, load_model(str(folder)), {}, None


_MAKERS: dict[str, Callable[[Task, Sequence[float], dict[str, Any]], Made]] = {
    "dial": _dial,
    "two models": _two_models,
    "student": _students,
    "scaled": _scaled,
    "interpolated": _interpolated,
}


def measured(
    model: Any, settings: dict[str, Any], lam: float, task: Task, options: dict[str, Any]
) -> dict[str, Any]:
    """Answer the questions, and compare the habits with the pair's own at the same branches."""
    from flexalign.fusion import fuse
    from flexalign.miniature import ALIGNED, REFERENCE, make_questions
    from flexalign.miniature.closed_form import expected_outcome, token_level
    from flexalign.miniature.demo import load_pair, measure, respond
    from flexalign.miniature.measure import branch_probabilities, mean_habits
    from flexalign.statistics import simultaneous_interval

    reference, aligned, tokenizer = load_pair()
    questions = make_questions(options["questions"], QUESTION_SEED)
    traces = respond(model, tokenizer, questions, seed=1 + task.seed, batch_size=96, **settings)
    world = token_level(REFERENCE, ALIGNED, lam, task.gate)
    row = measure(task.method, questions, traces, world).to_json()

    def logits(one: Any) -> Any:
        return lambda ids, attention: one(input_ids=ids, attention_mask=attention).logits

    def pair(ids: Any, attention: Any) -> Any:
        both = (logits(one)(ids, attention) for one in (reference, aligned))
        return fuse(*both, lam, task.gate)

    few = slice(options["judged"])
    judged = {"pair": pair} if settings else {"pair": pair, "model": logits(model)}
    forced = branch_probabilities(judged, tokenizer, questions[few], traces[few])
    own = mean_habits(forced["pair"])
    row |= {"pair_habits": asdict(own), "pair_outcome": asdict(expected_outcome(own))}
    if "model" in forced:
        row["model_habits"] = asdict(mean_habits(forced["model"]))
        row["departure"] = {
            habit: simultaneous_interval(
                forced["model"][habit].values - forced["pair"][habit].values,
                forced["pair"][habit].questions,
                len(JUDGED),
                CONFIDENCE,
            )
            for habit in JUDGED
            if habit in forced["pair"]
        }
    return row


def _cost(steps: int, start: float) -> dict[str, float]:
    return {"steps": steps, "cpu_seconds": time.process_time() - start}


def _store(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def stored(work: Path) -> list[dict[str, Any]]:
    """All cells that are measured."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in work.glob("*lambda=*.json")]
    return sorted(
        rows,
        key=lambda row: (
            METHODS.index(row["method"]),
            row["gate"] is not None,
            row["seed"],
            row["lambda"],
        ),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table of all that is stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 questions, 20 steps, one seed")
    parser.add_argument("--rewrite", action="store_true", help="only write the table again")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args(arguments)
    options = {
        "work": str(WORK.with_name("lora_dial-quick") if chosen.quick else WORK),
        "questions": 100 if chosen.quick else 5000,
        "judged": 100 if chosen.quick else 1000,
        "steps": 20 if chosen.quick else 150,
        "dial_steps": 40 if chosen.quick else 400,
    }
    seeds = [0] if chosen.quick else chosen.seeds
    if not chosen.rewrite:
        with ProcessPoolExecutor(chosen.workers, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(run, task, options) for task in tasks(seeds, chosen.methods)]
            for one in waiting:
                print("\n".join(one.result()), flush=True)

    results = {"options": options, "rows": stored(Path(options["work"]))}
    if chosen.quick:
        print(report(results))
    else:
        publish(results)


if __name__ == "__main__":
    main()
