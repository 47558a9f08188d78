"""What the paper's runs take: GPU hours, memory and disk, by arithmetic.

    python examples/paper/estimate.py

Nothing is measured. A forward pass costs 2·P + 2·T·L·H floating-point operations a token, with P
parameters, T tokens in the row, L layers of width H; a training step costs so many passes (below); a GPU
does 40 % of what its data sheet says in bf16. Sampling a token also moves the weights, shared by all
rows that are under way, and the row's whole key–value cache; the GPU moves 60 % of what its data sheet
says, and the slower of the two counts. Memory is the formula of `--dry-run`. Tokens of the evaluation
are those of the paper's tables, the others are guesses and are named below.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from flexalign.training.memory import MemoryNeed, Sizes, count_parameters, estimate_memory

HERE = Path(__file__).parent
GIB, GB = 2**30, 1e9


@dataclass(frozen=True)
class Accelerator:
    """A GPU by its data sheet.

    Attributes:
        name: What it is called.
        flops: Dense bf16 operations a second.
        bandwidth: Bytes a second between memory and chip.
    """

    name: str
    flops: float
    bandwidth: float


MEMORY = 80e9
"""Bytes of either card; nine tenths of them hold weights and key–value cache."""
H100 = Accelerator("H100", 989e12, 3.35e12)
A100 = Accelerator("A100", 312e12, 2.04e12)
UTILISATION, MOVED = 0.4, 0.6

SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": False,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}
"""What config.json says of the Qwen2 models of these sizes (R1's distillation of the small one has a
head of its own)."""

PASSES = {"realign online": 6, "realign cached": 4, "cache": 2, "adapter": 3, "whole": 4}
"""Forward passes that a token costs, a backward pass through all weights counted as two: one of the
student, one more to recompute activations, two back (one where the weights stand still), and one for
each teacher that runs. DPO's reference adds one pass over the data, once."""

PROMPTS, SAMPLED_TOKENS = (
    11_000,
    5_500,
)  # a guess: three in ten responses have 4,096 to 8,192 tokens
TRACES, TRACE_TOKENS, STEPS, STEP_ROWS = 3_200, 6_000, 200, 16
ANSWERS, ANSWER_TOKENS = 20_000, 700  # how many the paper took is not known to us
CONVERSATIONS, CONVERSATION_TOKENS = 200_000, 1_200  # UltraChat's
PAIRS, PAIR_TOKENS = 61_000, 1_000  # UltraFeedback's, both sides together
EPOCHS = 3
ROWS, LOCAL_ROWS = 256, 64  # under way at one time, on vLLM and on the local engine
LOCAL_STEP = 0.05  # seconds, a guess: transformers is bound by launches, not by the GPU

QUESTIONS = {"AIME24": 30, "AIME25": 30, "MATH-500": 500}
SAMPLES = 8
TABLE_1 = {
    "reference": (12602, 12278, 4699),
    "0.5": (10678, 10254, 3734),
    "aligned": (8520, 8143, 3030),
    "1": (8520, 8143, 3030),  # not in the paper: as the aligned model
    "1.5": (8091, 7353, 2982),
    "2": (7441, 6498, 2897),
    "5": (6297, 5652, 2844),
    "10": (6004, 5174, 2713),
    "iter1": (5631, 4434, 2599),
    "iter2": (4294, 3887, 2483),
}
BETWEEN = ("0.5", "1.5", "2")
TABLE_9 = {
    "7B": (
        (11224, 10867, 3925),
        (10576, 11279, 3667),
        (9942, 9003, 3073),
        (8718, 8629, 2291),
        (712, 608, 480),
        (619, 658, 440),
    ),
    "1.5B": tuple((2.5 * n, 2.5 * n, n) for n in (5042, 4699, 3321, 1765, 515, 480)),
}
"""Mean tokens at λ = −0.25 (−0.33), 0, 0.25, 0.5, 0.75, 1. Of the small one MATH-500's alone are known to
us; AIME counts 2.5 times as much, as in the reference's row of Table 1."""
DIALOGUE = {"AlpacaEval": 805 * 500 * 5, "Arena-Hard": 500 * 700 * 5, "MT-Bench": 80 * 2 * 400 * 5}
"""Questions × tokens × settings; the tokens are guesses."""


@cache
def config(size: str) -> Any:
    """Build a model's configuration."""
    return AutoConfig.for_model("qwen2", **SHAPES[size])


@cache
def parameters(size: str) -> int:
    """Count a model's parameters."""
    return count_parameters(config(size)).base


@cache
def layer_parameters(size: str) -> int:
    """Count one layer's parameters, which are those of an adapter."""
    more = SHAPES[size] | {"num_hidden_layers": SHAPES[size]["num_hidden_layers"] + 1}
    return count_parameters(AutoConfig.for_model("qwen2", **more)).base - parameters(size)


def pass_flops(size: str, tokens: float, length: float) -> float:
    """Operations of one forward pass over so many tokens, in rows of a length."""
    shape = SHAPES[size]
    attention = 2 * length * shape["num_hidden_layers"] * shape["hidden_size"]
    return tokens * (2 * parameters(size) + attention)


def training_hours(gpu: Accelerator, size: str, run: str, tokens: float, length: float) -> float:
    """Hours of a training run over so many tokens."""
    return PASSES[run] * pass_flops(size, tokens, length) / (UTILISATION * gpu.flops) / 3600


def sampling_hours(
    gpu: Accelerator, size: str, tokens: float, length: float, streams: int = 1
) -> float:
    """Hours of sampling so many tokens, in responses of a mean length, at most `ROWS` at a time."""
    shape = SHAPES[size]
    width = shape["hidden_size"] // shape["num_attention_heads"]
    position = 2 * 2 * shape["num_key_value_heads"] * width * shape["num_hidden_layers"]
    weights, cached = 2 * parameters(size), streams * position * length / 2
    rows = min(ROWS, (0.9 * MEMORY - weights) / cached)
    bytes_moved = tokens * (weights / rows + cached)
    computing = streams * pass_flops(size, tokens, length) / (UTILISATION * gpu.flops)
    return max(computing, bytes_moved / (MOVED * gpu.bandwidth)) / 3600


def evaluation_tokens(means: tuple[float, ...]) -> float:
    """Tokens of all responses to the three tasks."""
    return SAMPLES * sum(n * mean for n, mean in zip(QUESTIONS.values(), means, strict=True))


def steps() -> Iterator[tuple[str, str, float, dict[str, float]]]:
    """Give every step that costs: what it belongs to, what it is, its tokens, and hours by GPU."""
    gpus = (H100, A100)

    def sample(
        size: str, tokens: float, length: float, streams: int = 1
    ) -> tuple[float, dict[str, float]]:
        return tokens, {g.name: sampling_hours(g, size, tokens, length, streams) for g in gpus}

    def train(size: str, run: str, tokens: float, length: float) -> tuple[float, dict[str, float]]:
        return tokens, {g.name: training_hours(g, size, run, tokens, length) for g in gpus}

    tokens = STEPS * STEP_ROWS * TRACE_TOKENS
    yield "Table 1", "sample", *sample("1.5B", PROMPTS * SAMPLED_TOKENS, SAMPLED_TOKENS)
    yield "Table 1", "cache", *train("1.5B", "cache", TRACES * TRACE_TOKENS, TRACE_TOKENS)
    yield "Table 1", "realign, six λ", *train("1.5B", "realign cached", 6 * tokens, TRACE_TOKENS)
    yield "Table 1", "rounds 1 to 3", *train("1.5B", "realign online", 3 * tokens, TRACE_TOKENS)
    measured = sum(map(evaluation_tokens, TABLE_1.values()))
    yield "Table 1", f"evaluate {len(TABLE_1)} models", *sample("1.5B", measured, 8_000)
    measured = sum(evaluation_tokens(TABLE_1[lam]) for lam in BETWEEN)
    yield "Table 1", "evaluate the weights between", *sample("1.5B", measured, 8_000)

    tokens = EPOCHS * ANSWERS * ANSWER_TOKENS
    for size in ("7B", "1.5B"):
        yield f"Table 9, {size}", "adapt", *train(size, "adapter", tokens, ANSWER_TOKENS)
        settings = TABLE_9[size]
        # The adaptive dial writes at most what both ends do, at each of its three thresholds.
        both = 3 * (evaluation_tokens(settings[1]) + evaluation_tokens(settings[-1]))
        measured = sum(map(evaluation_tokens, settings)) + both
        yield f"Table 9, {size}", "evaluate", *sample(size, measured, 8_000, streams=2)

    tokens = CONVERSATIONS * CONVERSATION_TOKENS
    yield "Dialogue", "fine-tune the base", *train("7B", "whole", tokens, CONVERSATION_TOKENS)
    tokens = (EPOCHS + 1 / 3) * PAIRS * PAIR_TOKENS
    yield "Dialogue", "adapt", *train("7B", "adapter", tokens, PAIR_TOKENS / 2)
    yield "Dialogue", "ask", *sample("7B", sum(DIALOGUE.values()), 700, streams=2)


def local_hours() -> float:
    """Hours of the two-model decoder, a guess: a step of a batch takes `LOCAL_STEP` for each model."""
    rows = 2 * (30 + 30 + 100)  # two samples
    batches = rows / LOCAL_ROWS
    return 4 * batches * 16_384 * 2 * LOCAL_STEP / 3600  # four λ; the longest row decides


def rows_of_a_pass(tree: dict[str, Any]) -> int:
    """Return how many rows one forward pass has; a pair has two."""
    each = 2 if tree.get("method") == "dpo" else 1
    return each * int(tree["training"]["per_device_train_batch_size"])


def memory(recipe: str) -> tuple[dict[str, Any], str, MemoryNeed]:
    """Return a recipe, its model's size, and what the dry run would say of its longest rows."""
    tree = yaml.safe_load((HERE / recipe).read_text(encoding="utf-8"))
    size = "7B" if "7B" in tree.get("base", "") else "1.5B"
    whole, training = parameters(size), tree["training"]
    is_dial = "base" in tree
    need = estimate_memory(
        config(size),
        Sizes(whole, layer_parameters(size) if is_dial else whole),
        aligned_parameters=0 if is_dial else whole,
        cached_heads=2 if tree.get("teacher") == "cached" else None,
        rows=rows_of_a_pass(tree),
        tokens=training["max_length"],
        chunk_size=256,
        half_precision=True,
        checkpointing=True,
    )
    return tree, size, need


def hours_table() -> list[str]:
    """Return the table of hours."""
    lines = [
        "| run | step | tokens, millions | H100 hours | A100 hours |",
        "|---|---|---|---|---|",
    ]
    totals = {"H100": 0.0, "A100": 0.0}
    for run, step, tokens, hours in steps():
        lines.append(
            f"| {run} | {step} | {tokens / 1e6:.0f} | {hours['H100']:.1f} | {hours['A100']:.1f} |"
        )
        totals = {name: total + hours[name] for name, total in totals.items()}
    lines.append(f"| all | | | {totals['H100']:.0f} | {totals['A100']:.0f} |")
    return lines


def memory_table() -> list[str]:
    """Return the table of memory."""
    lines = [
        "| recipe | model | rows × tokens | trained, millions | weights | gradients, AdamW | "
        "activations, loss | total, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe in sorted(file.name for file in HERE.glob("*.yaml")):
        tree, size, need = memory(recipe)
        trained = layer_parameters(size) if "base" in tree else parameters(size)
        training, gib = tree["training"], need.to_gib()
        shape = f"{rows_of_a_pass(tree)} × {training['max_length']}"
        lines.append(
            f"| `{recipe}` | {size} | {shape} | {trained / 1e6:.0f} | {gib['weights']:.1f} | "
            f"{gib['gradients'] + gib['optimizer']:.1f} | {gib['activations'] + gib['loss']:.1f} | "
            f"{gib['total']:.1f} |"
        )
    return lines


def disk_table() -> list[str]:
    """Return the table of disk space."""
    small, large = (2 * parameters(size) / GB for size in SHAPES)
    width = SHAPES["1.5B"]["hidden_size"]
    hidden = 2 * width * 2 * TRACES * TRACE_TOKENS / GB
    state = 12 * parameters("1.5B") / GB  # weights and two moments in float32
    rows = {
        "models as they are fetched: two of 1.5B, two of 7B": 2 * small + 2 * large,
        "traces: text and token ids": (4 + 7) * PROMPTS * SAMPLED_TOKENS / GB,
        "the cache: 6 KiB for each response token": hidden,
        "nine students, stored in float32": 9 * 2 * small,
        "two checkpoints with the optimizer's state, while one student trains": 2 * state,
        "the weights between, three models": 3 * 2 * small,
        "three adapters": 2 * 4 * layer_parameters("7B") / GB + 4 * layer_parameters("1.5B") / GB,
    }
    lines = ["| what | GB |", "|---|---|"]
    lines += [f"| {what} | {size:.0f} |" for what, size in rows.items()]
    return [*lines, f"| all | {sum(rows.values()):.0f} |"]


def report() -> str:
    """Return all tables as Markdown."""
    local = (
        f"The two-model decoder, on the local engine: {local_hours():.0f} hours, if a step of "
        f"{LOCAL_ROWS} rows takes {1000 * LOCAL_STEP:.0f} ms a model (a guess)."
    )
    parts = [hours_table(), [local], memory_table(), disk_table()]
    return "\n\n".join("\n".join(lines) for lines in parts)


if __name__ == "__main__":
    print(report())
