"""Pairs made by reinforcement learning: what λ does over them, by every method.

    python benchmarks/grpo.py                             # many hours on two cores; goes on
    python benchmarks/grpo.py --seeds 0 --methods pair    # one pair, decoded as two models
    python benchmarks/grpo.py --quick                     # minutes: few questions and steps
    python benchmarks/grpo.py --rewrite                   # only write the tables of what is stored

The aligned models are those of ``flexalign miniature align --method grpo`` in ``out/grpo/seed=N``;
what is not there is made first. Of each pair λ is turned plain, and gated by the τ that
``flexalign inspect --diff`` proposes for it, by two models decoded together, a student of each λ,
one LoRA dial, students of two rounds (√λ each, which amounts to λ) and interpolated weights.
``out/grpo/placebo-*`` are controls: as many steps with a reward that says nothing.

A cell (seed, method, gate, λ) is stored as soon as it is measured; what is there is not made again.
A gate changes nothing at λ in [0, 1], where only the dial, which is trained for all λ, is measured
again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _cells import read_cells, store
from _grpo_report import GATELESS, LAMS, METHODS, mean_habits_of, publish, report
from _methods import Sides, Task, run

MODELS = Path("out/grpo")
GATES = ("plain", "gated")
ROWS = 200
"""Traces on which a gate is proposed, as many as ``inspect --diff`` reads."""


def prepare(models: Path, seed: int, options: dict[str, Any]) -> float | None:
    """Make what is missing of a seed's aligned model, and return the gate proposed for the pair."""
    from flexalign.miniature.align import RECORD

    folder = models / f"seed={seed}"
    if not (folder / RECORD).is_file():
        # In a process of its own, whose memory is freed at its end.
        command = [sys.executable, "-m", "flexalign", "miniature", "align", "--method", "grpo"]
        command += ["--seed", str(seed), "--output", str(folder), *options["training"]]
        subprocess.run(command, check=True)

    proposed = Path(options["work"]) / f"seed={seed}.gate.json"
    if not proposed.is_file():
        from flexalign import ModelPair
        from flexalign.analysis.difference import load_rows, measure_difference
        from flexalign.miniature import make_traces

        proposed.parent.mkdir(parents=True, exist_ok=True)
        traces = proposed.with_name("traces.jsonl")
        lines = [json.dumps(row) for row in make_traces(ROWS, seed=0)]
        traces.write_text("\n".join(lines) + "\n", encoding="utf-8")
        pair = ModelPair.load("miniature:reference", str(folder))
        found = measure_difference(pair, load_rows(traces, pair.tokenizer))
        store(proposed, found.to_json())
    gate: float | None = json.loads(proposed.read_text(encoding="utf-8"))["gate"]
    return gate


def tasks(
    models: Path,
    seeds: dict[int, float | None],
    methods: Sequence[str],
    gates: Sequence[str],
    lams: tuple[float, ...],
) -> list[Task]:
    """All tasks, one seed after the other; what a gate does not change is measured once.

    Args:
        models: The folder of the aligned models.
        seeds: The gate that is proposed for each seed's pair.
        methods: The methods.
        gates: ``plain``, ``gated`` or both.
        lams: The λ.
    """
    from flexalign.miniature.align import RECORD

    found = []
    for seed, proposed in seeds.items():
        folder = models / f"seed={seed}"
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sides = Sides(aligned=str(folder), habits=mean_habits_of(record))
        for gate in gates:
            if gate == "gated" and proposed is None:
                continue
            for method in methods:
                own = lams
                if gate == "gated" and method != "dial":
                    own = () if method in GATELESS else tuple(lam for lam in lams if lam > 1)
                if own:
                    tau = proposed if gate == "gated" else None
                    found.append(Task("rl", method, tau, seed, own, sides))
    return found


def results(models: Path, options: dict[str, Any]) -> dict[str, Any]:
    """All that is stored: the cells, the aligned models and controls, and the gates."""
    from flexalign.miniature.align import RECORD

    work = Path(options["work"])
    rows = sorted(
        read_cells(work),
        key=lambda row: (
            row["seed"],
            METHODS.index(row["method"]),
            row["gate"] is not None,
            row["lambda"],
        ),
    )
    gates = {
        path.name.split(".")[0].removeprefix("seed="): json.loads(path.read_text("utf-8"))["gate"]
        for path in sorted(work.glob("seed=*.gate.json"))
    }
    alignments = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(models.glob(f"*/{RECORD}"), key=lambda path: path.parent.name)
    }
    told = {key: value for key, value in options.items() if key != "work"}
    return {"options": told, "alignments": alignments, "gates": gates, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table of all that is stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="60 questions, few steps and λ")
    parser.add_argument("--rewrite", action="store_true", help="only write the table again")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--gates", nargs="*", default=GATES, choices=GATES)
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args(arguments)
    models = MODELS.with_name("grpo-quick") if chosen.quick else MODELS
    questions = 60 if chosen.quick else chosen.questions
    options = {
        "work": str(models / f"cells-{questions}"),
        "questions": questions,
        "judged": min(400, questions),
        "steps": 4 if chosen.quick else 150,
        "dial_steps": 4 if chosen.quick else 700,
        "training": ["--steps", "2", "--questions", "60"] if chosen.quick else [],
    }

    if not chosen.rewrite:
        seeds = [0] if chosen.quick else chosen.seeds
        proposed = {seed: prepare(models, seed, options) for seed in seeds}
        lams = (1.0, 2.0) if chosen.quick else LAMS
        asked = tasks(models, proposed, chosen.methods, chosen.gates, lams)
        with ProcessPoolExecutor(chosen.workers, mp_context=get_context("spawn")) as pool:
            for one in [pool.submit(run, task, options) for task in asked]:
                print("\n".join(one.result()), flush=True)

    found = results(models, options)
    if chosen.quick:
        print(report(found))
    else:
        publish(found)


if __name__ == "__main__":
    main()
