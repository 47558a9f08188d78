"""Dials on vLLM beside the plain model on vLLM: tokens per second as ratios to plain.

Run it from the repository, in the environment that has vLLM (``make .venv-vllm/installed``):

    .venv-vllm/bin/python benchmarks/dials_vllm.py                       # every row, ten quiet minutes
    .venv-vllm/bin/python benchmarks/dials_vllm.py --rows decode:8       # one row into the table
    .venv-vllm/bin/python benchmarks/dials_vllm.py --shape Qwen2.5-1.5B --rows decode:1 --new-tokens 16
    .venv-vllm/bin/python benchmarks/dials_vllm.py --quick               # few tokens, nothing written
    .venv-vllm/bin/python benchmarks/dials_vllm.py --clock cpu           # where others compute too

Three engines stand side by side: the plain model, the same one with an InRa adapter, and the same
one with a LoRA dial (rank 16 on all linear layers), both at λ = 0.5; those that are not asked wait. A
round asks each in turn, and turns the order around each time. A ratio is the median over rounds of
plain's time to the dial's in the same round, with its least and largest. ``decode:B`` are B requests
with prompts of 32 tokens: the time of 65 tokens (``--new-tokens`` and one) less that of the first. ``prefill:N`` is one request
of N tokens up to its first token. The prefix cache is off. Time is that of the wall, or with
``--clock cpu`` that for which the engine's process has computed, on a machine that is not quiet; such
figures are printed and not kept.

The model has the shape of SmolLM2-135M (30 layers, width 576, vocabulary 49152), or that of
Qwen2.5-1.5B (28 layers, width 1536, vocabulary 151936), with random weights in bfloat16; prompts are
random tokens. InRa's decoding reads each weight once, as plain does, so its
cost is arithmetic; its prefill is arithmetic alone, and 30 layers against 2·30 + 1 bound it by 0.49.
The LoRA dial's arithmetic is that of the low-rank term: at rank 16, 5.5 % of a decoding step's.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from _document import put_section
from _vllm_engines import CLOCKS, RANK, SHAPES, Engine, folders, measure

RESULTS = Path(__file__).parent / "results" / "dials_vllm.json"
ROWS = ("decode:1", "decode:8", "decode:32", "prefill:400", "prefill:4000")
TARGETS = {
    "inra": dict(zip(ROWS, (0.85, 0.7, 0.5, 0.44, 0.44), strict=True)),
    "lora": dict.fromkeys(ROWS[:3], 0.9),
}
NAMES = {"plain": "plain", "inra": "InRa", "lora": "LoRA dial"}


def lines(found: dict[str, Any]) -> list[str]:
    """The rows of the table, one for each dial."""
    speed = found["tokens_per_second"]
    table = []
    for name in sorted(found["dials"]):
        dial, target = found["dials"][name], TARGETS[name].get(found["row"])
        verdict = "met" if target is not None and dial["ratio"] >= target else "**not met**"
        goal = "–" if target is None else f"≥ {target}: {verdict}"
        least, largest = dial["range"]
        table.append(
            f"| {found['row']} | {NAMES[name]} | {found['rounds']} | {speed['plain']:.1f} "
            f"| {speed[name]:.1f} | {dial['ratio']:.2f} ({least:.2f}–{largest:.2f}) | {goal} |"
        )
    return table


HEADER = [
    "| row | dial | rounds | plain, tokens/s | dial, tokens/s | dial to plain (least–largest) "
    "| target |",
    "|---|---|--:|--:|--:|--:|---|",
]


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    return f"# Dials on vLLM beside the plain model\n\n{section(results)}"


def section(results: dict[str, Any]) -> str:
    """The section of the results: a table for each machine and mode."""
    from _machine import unique

    parts = [
        "`.venv-vllm/bin/python benchmarks/dials_vllm.py`, in bfloat16. What the columns mean: the script's "
        "head.",
    ]
    settings = unique(row["machine"] for row in results["rows"])
    for facts in settings:
        lora = f", the LoRA of rank {facts['rank']}" if "rank" in facts else ""
        parts.append(
            f"**{facts['shape']}'s shape, {facts['cpu']}**, {facts['cores']} cores of which vLLM computes on one, "
            f"{facts['mode']}; "
            f"vLLM {facts['vllm']}, torch {facts['torch']}{lora}."
        )
        rows = [row for row in results["rows"] if row["machine"] == facts]
        parts.append("\n".join([*HEADER, *(line for row in rows for line in lines(row))]))
    return "\n\n".join(parts) + "\n"


def place(row: dict[str, Any]) -> tuple[str, ...]:
    """What tells rows apart: requests or tokens, the shape, the processor, whether compiled."""
    facts = row["machine"]
    return row["row"], facts["shape"], facts["cpu"], facts["mode"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--shape", choices=SHAPES, default="SmolLM2-135M", help="of the model")
    parser.add_argument("--rank", type=int, default=RANK, help="of the LoRA")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="which seconds count")
    parser.add_argument("--compiled", action="store_true", help="by torch.compile; else eager")
    parser.add_argument("--quick", action="store_true", help="few tokens, nothing written")
    arguments = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print(
            "benchmarks/dials_vllm.py: skipped, as vLLM is not installed here; run it by "
            ".venv-vllm/bin/python (make .venv-vllm/installed)",
            file=sys.stderr,
        )
        return
    is_kept = not arguments.quick and arguments.clock == "wall"
    if arguments.quick:
        arguments.rounds, arguments.new_tokens = 1, 8
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # each is in a process of its own already
    from _machine import machine
    from vllm import __version__

    mode = "compiled" if arguments.compiled else "eager"
    stored = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    measured = {place(row): row for row in stored}
    facts = machine() | {
        "vllm": __version__,
        "mode": mode,
        "rank": arguments.rank,
        "shape": arguments.shape,
    }
    with tempfile.TemporaryDirectory() as where:
        made = folders(Path(where), arguments.rank, arguments.shape)
        prompts = [int(size) for _, size in (row.split(":") for row in arguments.rows)]
        longest = max(1024, *prompts)  # 32 prompts of 32 tokens come together
        engines = {}
        for name, folder in made.items():
            engines[name] = Engine(folder, arguments.compiled, arguments.clock, longest)
            engines[name].wait()
        print("\n".join(HEADER), flush=True)
        for row in arguments.rows:
            found = measure(engines, row, arguments.rounds, arguments.new_tokens)
            found["machine"] = facts
            print("\n".join(lines(found)), flush=True)
            measured[place(found)] = found
            results = {"rows": sorted(measured.values(), key=lambda one: ROWS.index(one["row"]))}
            if is_kept:
                RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
                RESULTS.with_suffix(".md").write_text(markdown(results))
                put_section("dials_vllm", section(results))


if __name__ == "__main__":
    main()
