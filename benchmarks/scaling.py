"""The memory that `flexalign realign --dry-run` prints, beside what the run then took.

    python benchmarks/scaling.py              # about four minutes on one core
    python benchmarks/scaling.py --quick      # the smallest model alone; nothing written
    python benchmarks/scaling.py --tables     # the tables of docs/scaling.md, by arithmetic

Random models of three sizes, float32, rows of 512 tokens: all weights trained with both teachers
in memory (``full``), a LoRA student on the reference (``LoRA``), and all weights from a cache of
hidden states (``cached``); once with every layer's activations kept. Each run is a process of its
own that first makes a run of the smallest kind, so that libraries are loaded; its memory is the
growth of the resident set from there to its peak, by the kernel's high-water mark. The C library is
told to give back every freed tensor, so that what it keeps for later does not count.
"""

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from _machine import machine, peak_growth
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from flexalign.cli.app import app
from flexalign.training.memory import count_parameters, estimate_memory
from flexalign.training.trainer import TrRaTrainer  # noqa: F401 - before anything is measured

RESULTS = Path(__file__).parent / "results"
TOKENS, PROMPT, STEPS = 512, 32, 2
TINY = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 512}
SIZES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "vocab_size": 4096},
    "middle": {"hidden_size": 448, "num_hidden_layers": 8, "vocab_size": 8192},
    "large": {"hidden_size": 640, "num_hidden_layers": 10, "vocab_size": 12288},
}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, activations kept": {"training": {"activation_checkpointing": False}},
    "LoRA": {"lora": {"r": 16}},
    "cached": {"teacher": "cached"},
}
CLOSE = 0.15

KNOWN = {
    "1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151_936),
    "7B": ("qwen2", 3584, 18_944, 28, 28, 4, 152_064),
    "32B": ("qwen2", 5120, 27_648, 64, 40, 8, 152_064),
    "70B": ("llama", 8192, 28_672, 80, 64, 8, 128_256),
}
"""The shapes of DeepSeek-R1-Distill-Qwen 1.5B, 7B and 32B and of its Llama 70B: width, inner width,
layers, heads, key–value heads, vocabulary."""
LONG, CONTEXT = 8192, 16_384
PASSES = {"full": 6, "full, cached": 4, "LoRA": 5, "LoRA, cached": 3}
"""Forward passes that a token costs, a backward pass through all weights counted as two: of the
student one, one more to recompute activations, two back (one where the weights stand still), and
one for each teacher."""
STEP_ROWS, EFFECTIVE_FLOPS = 16, 4e14


def write_models(folder: Path, size: dict[str, int]) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<end>", "<pad>", *letters]
    names += [f"never{number}" for number in range(size["vocab_size"] - len(names))]
    plain = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<end>", pad_token="<pad>"
    )
    width = size["hidden_size"]
    config = AutoConfig.for_model(
        "qwen2",
        **size,
        intermediate_size=3 * width,
        num_attention_heads=width // 64,
        num_key_value_heads=1,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=1,
    )
    for seed, name in enumerate(("reference", "aligned")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_recipe(folder: Path, size: dict[str, int], way: dict[str, Any]) -> Path:
    chosen = random.Random(0)
    rows = []
    for _ in range(2 * STEPS):
        text = "".join(chosen.choices("0123456789", k=TOKENS - 1))
        rows.append({"prompt": text[:PROMPT], "completion": text[PROMPT:]})
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {
        "max_steps": STEPS,
        "max_length": TOKENS,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "use_cpu": True,
    }
    tree = {name: str(folder / name) for name in ("reference", "aligned", "output")}
    tree |= {"data": str(folder / "traces.jsonl"), "lambda": 2.0}
    tree |= way | {"training": training | way.get("training", {})}
    if way.get("teacher") == "cached":
        tree["cache_dir"] = str(folder / "cache")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command_line(*arguments: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        app(list(arguments), standalone_mode=False)
    return shown.getvalue()


def measure(size: str, way: str) -> dict[str, Any]:
    """Compare the two figures of one run, in this process."""
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        write_models(Path(folder), TINY)
        command_line("realign", str(write_recipe(Path(folder), TINY, WAYS["full"])))
    with TemporaryDirectory() as folder:
        write_models(Path(folder), SIZES[size])
        recipe = str(write_recipe(Path(folder), SIZES[size], WAYS[way]))
        if "teacher" in WAYS[way]:
            command_line("cache", recipe)
        shown = json.loads(command_line("realign", recipe, "--dry-run", "--json"))
        with peak_growth() as growth:
            command_line("realign", recipe)
    parts = {name: round(1024 * gib, 1) for name, gib in shown["memory_gib"].items()}
    return {
        "size": size,
        "way": way,
        "trained_parameters": shown["trained_parameters"],
        "printed_mib": parts.pop("total"),
        "measured_mib": round(growth["mib"], 1),
        "ratio": round(1024 * shown["memory_gib"]["total"] / growth["mib"], 3),
        "parts_mib": parts,
    }


def show_tables() -> None:
    """Memory by the formula of `--dry-run` in bfloat16, seconds and caches by arithmetic."""
    print(
        "| pair | run | weights | gradients, optimizer | activations, loss | total, GiB | s/step |"
    )
    print("|---|---|---|---|---|---|---|")
    caches = ["| base | plain | with a dial |", "|---|---|---|"]
    for name, (family, width, inner, layers, heads, kv_heads, vocabulary) in KNOWN.items():
        config = AutoConfig.for_model(
            family,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=False,
        )
        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        for run, passes in PASSES.items():
            sizes = count_parameters(config, lora if run.startswith("LoRA") else None)
            need = estimate_memory(
                config,
                sizes,
                aligned_parameters=sizes.base,
                cached_heads=2 if run.endswith("cached") else None,
                rows=1,
                tokens=LONG,
                chunk_size=256,
                half_precision=True,
                checkpointing=True,
            ).to_gib()
            attention = 2 * LONG * layers * width
            flops = passes * (2 * sizes.base + attention) * STEP_ROWS * LONG
            print(
                f"| {name} | {run} | {need['weights']:.1f} | "
                f"{need['gradients'] + need['optimizer']:.1f} | "
                f"{need['activations'] + need['loss']:.1f} | {need['total']:.1f} | "
                f"{flops / EFFECTIVE_FLOPS:.0f} |"
            )
        layer = 2 * kv_heads * (width // heads) * 2 * CONTEXT / 2**30
        caches.append(f"| {name} | {layers * layer:.2f} | {(2 * layers + 1) * layer:.2f} |")
    print("", *caches, sep="\n")


def write_results(rows: list[dict[str, Any]]) -> None:
    facts = machine()
    (RESULTS / "scaling.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=2))
    lines = [
        "# Memory of a run: printed before it, and measured",
        "",
        f"`python benchmarks/scaling.py`: {facts['cpu']}, torch {facts['torch']}, float32, rows of "
        f"{TOKENS} tokens. Ratio: what `flexalign realign --dry-run` prints ÷ what the run took.",
        "",
        "| model | run | trained | printed, MiB | measured, MiB | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['size']} | {row['way']} | {row['trained_parameters'] / 1e6:.1f} M | "
            f"{row['printed_mib']:.0f} | {row['measured_mib']:.0f} | {row['ratio']:.2f} |"
        )
    (RESULTS / "scaling.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    if options.tables:
        show_tables()
        return
    rows = []
    for size in ["small"] if options.quick else SIZES:
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", size, way]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], file=sys.stderr, flush=True)
    far = [row for row in rows if abs(row["ratio"] - 1) > CLOSE]
    print(f"{len(rows) - len(far)} of {len(rows)} within {CLOSE:.0%}")
    if not options.quick:
        write_results(rows)


if __name__ == "__main__":
    main()
