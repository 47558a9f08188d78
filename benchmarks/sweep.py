"""A sweep of λ over one prefill, beside a run for each λ.

Run it from the repository:

    python benchmarks/sweep.py             # a prompt of 512 tokens at 8 λ, minutes on one core
    python benchmarks/sweep.py --quick     # a prompt of 64 tokens, half a minute

The model has the shape of SmolLM2-135M (30 layers, width 576, vocabulary 49152) with random
weights in float32, and an adapter. Both ways take turns, and a figure is the median over rounds.
CPU time is what other work on the machine disturbs least.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _machine import machine
from dials import SHAPE
from transformers import LlamaForCausalLM

from flexalign.inra import InRaModel

LAMS = [-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]


RESULTS = Path(__file__).parent / "results" / "sweep.json"
TARGET = 3.0


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def make_model() -> InRaModel:
    torch.manual_seed(0)
    model = InRaModel.create(LlamaForCausalLM(SHAPE).eval())
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.inra_config = replace(model.inra_config, lambda_range=(-1, 3))
    return model


def measure(model: InRaModel, prompt: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Let both ways take turns, after one unmeasured run of each that compares what they write."""
    tokens = torch.randint(3, SHAPE.vocab_size, (1, prompt))
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
    }

    def separate() -> torch.Tensor:
        return torch.cat([model.generate(tokens, lam=lam, **options) for lam in LAMS])

    def swept() -> torch.Tensor:
        return model.sweep(tokens, lams=LAMS, **options)

    new = (slice(None), slice(prompt, None))
    same = float((separate()[new] == swept()[new]).float().mean())
    times: dict[str, list[tuple[float, float]]] = {"separate": [], "sweep": []}
    for _ in range(rounds):
        times["separate"].append(seconds(separate))
        times["sweep"].append(seconds(swept))
    wall, cpu = ({way: [t[i] for t in taken] for way, taken in times.items()} for i in (0, 1))
    return {
        "prompt": prompt,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "same_tokens": same,
        "seconds": wall,
        "cpu_seconds": cpu,
    }


def faster(times: dict[str, list[float]]) -> float:
    """How many times faster the sweep is: the median over rounds."""
    pairs = zip(times["separate"], times["sweep"], strict=True)
    return statistics.median(apart / together for apart, together in pairs)


HEADER = (
    "| prompt | λ | new tokens | rounds | separate, CPU s | sweep, CPU s | faster, CPU time "
    f"| faster, wall time | target ≥ {TARGET:g}× | same tokens |\n"
    "|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|"
)


def line(row: dict[str, Any]) -> str:
    cpu = row["cpu_seconds"]
    apart, together = (statistics.median(cpu[way]) for way in ("separate", "sweep"))
    return (
        f"| {row['prompt']} | {len(LAMS)} | {row['new_tokens']} | {row['rounds']} | {apart:.2f} "
        f"| {together:.2f} | {faster(cpu):.1f}× | {faster(row['seconds']):.1f}× "
        f"| {'met' if faster(cpu) >= TARGET else '**not met**'} | {row['same_tokens']:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shorter prompt, nothing written")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompt, new_tokens = (64, [16]) if arguments.quick else (512, arguments.new_tokens)
    model = make_model()
    rows = []
    print(HEADER, flush=True)
    for new in new_tokens:
        rows.append(measure(model, prompt, new, arguments.rounds))
        print(line(rows[-1]), flush=True)
    if arguments.quick:
        return
    facts = machine()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": facts, "lams": LAMS, "rows": rows}, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(
        "# A sweep of λ over one prefill, beside a run for each λ\n\n"
        f"`python benchmarks/sweep.py`, the shape of SmolLM2-135M in float32, torch "
        f"{facts['torch']}, {facts['cpu']}, {facts['threads']} thread(s).\n\n"
        + "\n".join([HEADER, *map(line, rows)])
        + "\n"
    )


if __name__ == "__main__":
    main()
