"""One LoRA for every λ, beside what it replaces: habits, accuracy and tokens on the miniature.

    python benchmarks/lora_dial.py               # hours on two cores; a stopped run goes on
    python benchmarks/lora_dial.py --seeds 0     # the first of the three seeds alone
    python benchmarks/lora_dial.py --quick       # minutes: few questions and steps
    python benchmarks/lora_dial.py --rewrite     # only write the tables of what is stored

At each λ, plain up to 3 and gated up to 5: the LoRA dial, trained once; a student of that λ alone;
the two models themselves, decoded together; their interpolated weights; and a LoRA trained at
λ = 1 and scaled. Training is judged at the branches of the model's own responses: its habits
against the *pair's own form*, the fusion of both sides' probabilities at the same branches.

The same of a pair that is one model under two prompts, the miniature's hybrid.

A cell (pair, method, seed, gate, λ) is stored in ``out/lora_dial`` as soon as it is measured, and
the trained weights beside it. What is there is not made again.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _cells import (
    QUESTION_SEED,
    fused_logits,
    logits_of,
    measured,
    read_cells,
    store,
    trained,
    trained_dial,
)
from _lora_dial_report import GATE, GATED, METHODS, PLAIN, publish, report

WORK = Path("out/lora_dial")
BEYOND = 1.05
"""How far beyond its largest λ a dial is trained, whose end is learnt from one side only."""
PAIRS = ("miniature", "hybrid")
GATES: dict[str, float | None] = {"gated": GATE, "plain": None}


@dataclass(frozen=True)
class Task:
    """One method under one gate and seed: what is trained, and all its settings."""

    pair: str
    method: str
    gate: float | None
    seed: int

    @property
    def lams(self) -> tuple[float, ...]:
        return PLAIN if self.gate is None else GATED

    @property
    def name(self) -> str:
        gate = "plain" if self.gate is None else f"gate={self.gate:g}"
        return f"{self.pair},{self.method},{gate},seed={self.seed}"

    def cell(self, lam: float) -> str:
        """The name of a setting's file."""
        return f"{self.name},lambda={lam:g}.json"


def tasks(
    pairs: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    gates: Sequence[float | None] = (GATE, None),
) -> list[Task]:
    """All tasks, one seed after the other.

    What is not trained is measured with the first seed alone, and so is the hybrid, gated.
    Interpolated weights and a scaled LoRA know no gate: they are measured once, up to λ = 5.
    """
    found = []
    for seed in seeds:
        for gate in gates:
            for method in methods:
                is_trained = method in ("dial", "student", "scaled")
                has_gates = method in ("dial", "student", "pair")
                if "miniature" in pairs and (seed == 0 or is_trained) and (gate or has_gates):
                    found.append(Task("miniature", method, gate, seed))
                if "hybrid" in pairs and seed == 0 and gate and has_gates:
                    found.append(Task("hybrid", method, gate, seed))
    return found


def run(task: Task, options: dict[str, Any]) -> list[str]:
    """Train and measure what is missing of a task; return the names of its new cells."""
    import torch

    torch.set_num_threads(1)
    work = Path(options["work"])
    missing = [lam for lam in task.lams if not (work / task.cell(lam)).is_file()]
    if missing:
        for lam, model, settings, training in _MAKERS[task.method](task, missing, options):
            row = {**asdict(task), "lambda": lam, "training": training}
            row |= answered(model, settings, lam, task, options)
            store(work / task.cell(lam), row)
    return [task.cell(lam) for lam in missing]


Made = Iterator[tuple[float, Any, dict[str, Any], dict[str, Any] | None]]
"""λ, the model, the options of its `generate`, and what its training cost."""


def _dial(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """The LoRA dial, trained once for all λ of the task; each λ is then merged."""
    folder = Path(options["work"]) / task.name
    dial, training = _lora(
        task, {"low": 0, "high": BEYOND * max(task.lams)}, task.gate, folder, options
    )
    for lam in lams:
        yield lam, dial.merged(lam), {}, training


def _scaled(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """A LoRA trained at λ = 1 alone, whose strength is then λ."""
    dial, training = _lora(task, 1.0, None, Path(options["work"]) / task.name, options)
    for lam in lams:
        yield lam, dial.merged(lam), {}, training


def _lora(task: Task, lam: Any, gate: float | None, folder: Path, options: dict[str, Any]) -> Any:
    """Train a LoRA, or load it if it was trained before; return it with what its training cost."""
    steps = options["dial_steps"]

    def train(where: Path) -> dict[str, Any]:
        return _realign(task, lam, gate, where, steps, 1.5e-3, lora=True)

    return trained_dial(_base(task.pair), folder, train)


def _students(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """A student of each λ, all weights."""
    from flexalign.models.loading import load_model

    for lam in lams:
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "student"
            cost = _realign(task, lam, task.gate, folder, options["steps"], 5e-4, lora=False)
            yield lam, load_model(str(folder)), {}, cost


def _realign(
    task: Task,
    lam: Any,
    gate: float | None,
    folder: Path,
    steps: int,
    learning_rate: float,
    *,
    lora: bool,
) -> dict[str, Any]:
    """Train on the task's pair; return the steps and the seconds of one core."""
    from flexalign.miniature import SYSTEM

    base = _base(task.pair)
    return trained(
        folder,
        reference=base,
        aligned=(
            {"model": base, "system": SYSTEM} if task.pair == "hybrid" else "miniature:aligned"
        ),
        lam=lam,
        gate=gate,
        steps=steps,
        learning_rate=learning_rate,
        seed=task.seed,
        lora=lora,
    )


def _pair(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """Both sides, fused while they decode."""
    from flexalign import ModelPair, TwoModelDecoder

    if task.pair == "hybrid":
        from flexalign.generation.two_prompts import TwoPromptDecoder

        decoder: Any = TwoPromptDecoder.from_pretrained(_base(task.pair), _prompts())
    else:
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
    "pair": _pair,
    "student": _students,
    "scaled": _scaled,
    "interpolated": _interpolated,
}


def _base(pair: str) -> str:
    return "miniature:hybrid" if pair == "hybrid" else "miniature:reference"


def _prompts() -> Any:
    from flexalign.data.prompting import PromptSettings
    from flexalign.miniature import SYSTEM
    from flexalign.models.prompted import PromptPair

    return PromptPair(aligned=PromptSettings(system=SYSTEM))


def answered(
    model: Any, settings: dict[str, Any], lam: float, task: Task, options: dict[str, Any]
) -> dict[str, Any]:
    """Answer the questions, and compare the habits with the pair's own at the same branches."""
    from flexalign.miniature import ALIGNED, REFERENCE, make_questions
    from flexalign.miniature.closed_form import token_level
    from flexalign.miniature.demo import respond
    from flexalign.models.loading import load_tokenizer

    tokenizer = load_tokenizer(_base(task.pair))
    questions = make_questions(options["questions"], QUESTION_SEED)
    return measured(
        task.method,
        questions,
        respond(model, tokenizer, questions, seed=1 + task.seed, batch_size=96, **settings),
        tokenizer=tokenizer,
        world=token_level(REFERENCE, ALIGNED, lam, task.gate),
        pair=_own_form(task.pair, lam, task.gate, tokenizer),
        model=None if settings else logits_of(model),
        judged=options["judged"],
    )


def _own_form(pair: str, lam: float, gate: float | None, tokenizer: Any) -> Any:
    """The fused logits of a pair's two sides, as a function of a batch."""
    from flexalign.miniature import SYSTEM
    from flexalign.miniature.measure import told
    from flexalign.models.loading import load_model

    reference = logits_of(load_model(_base(pair)))
    if pair == "hybrid":
        aligned = told(reference, tokenizer, SYSTEM)
    else:
        aligned = logits_of(load_model("miniature:aligned"))
    return fused_logits(reference, aligned, lam, gate)


def stored(work: Path) -> list[dict[str, Any]]:
    """All cells that are measured."""
    return sorted(
        read_cells(work),
        key=lambda row: (
            PAIRS.index(row["pair"]),
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
    parser.add_argument("--pairs", nargs="*", default=PAIRS, choices=PAIRS)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--gates", nargs="*", default=list(GATES), choices=GATES)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args(arguments)
    options = {
        "work": str(WORK.with_name("lora_dial-quick") if chosen.quick else WORK),
        "questions": 100 if chosen.quick else 5000,
        "judged": 100 if chosen.quick else 400,
        "steps": 20 if chosen.quick else 150,
        "dial_steps": 40 if chosen.quick else 700,
    }
    seeds = [0] if chosen.quick else chosen.seeds
    if not chosen.rewrite:
        with ProcessPoolExecutor(chosen.workers, mp_context=get_context("spawn")) as pool:
            gates = [GATES[name] for name in chosen.gates]
            asked = tasks(chosen.pairs, chosen.methods, seeds, gates)
            for one in [pool.submit(run, task, options) for task in asked]:
                print("\n".join(one.result()), flush=True)

    results = {"options": options, "rows": stored(Path(options["work"]))}
    if chosen.quick:
        print(report(results))
    else:
        publish(results)


if __name__ == "__main__":
    main()
