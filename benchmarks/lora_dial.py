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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _cells import read_cells
from _lora_dial_report import GATE, GATED, METHODS, PLAIN, publish, report
from _methods import Sides, Task, run

from flexalign.miniature import SYSTEM

WORK = Path("out/lora_dial")
PAIRS = {
    "miniature": Sides(),
    "hybrid": Sides("miniature:hybrid", "miniature:hybrid", system=SYSTEM),
}
GATES: dict[str, float | None] = {"gated": GATE, "plain": None}


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

    def task(pair: str, method: str, gate: float | None, seed: int) -> Task:
        return Task(pair, method, gate, seed, PLAIN if gate is None else GATED, PAIRS[pair])

    found = []
    for seed in seeds:
        for gate in gates:
            for method in methods:
                is_trained = method in ("dial", "student", "scaled")
                has_gates = method in ("dial", "student", "pair")
                if "miniature" in pairs and (seed == 0 or is_trained) and (gate or has_gates):
                    found.append(task("miniature", method, gate, seed))
                if "hybrid" in pairs and seed == 0 and gate and has_gates:
                    found.append(task("hybrid", method, gate, seed))
    return found


def stored(work: Path) -> list[dict[str, Any]]:
    """All cells that are measured."""
    return sorted(
        read_cells(work),
        key=lambda row: (
            list(PAIRS).index(row["pair"]),
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
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS), choices=PAIRS)
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
