"""Decoding with the dial beside the plain model: time and peak memory as ratios to plain.

Run it from the repository:

    python benchmarks/inra.py                          # every row, an hour on two cores
    python benchmarks/inra.py --rows float32:32:1      # one row (dtype:prompt:batch) into the table
    python benchmarks/inra.py --rows float32:32:1 --methods inra --add --rounds 3     # more rounds
    python benchmarks/inra.py --quick                  # a small row, nothing written

Methods, all by transformers' own ``generate``, greedy:

* ``plain``: the base model;
* ``inra``: both streams as rows of one batch, λ = 0.5;
* ``two passes``: the paper's way, the base stream and then the adapter stream, each with its own
  cache and head product;
* ``two models``: equation 5 over two whole models;
* ``λ=0``, ``λ=1``: InRa where one stream is all that is needed.

The model has the shape of SmolLM2-135M (30 layers, width 576, vocabulary 49152) with random
weights; prompts are random tokens. A round decodes with every method in turn, each from its own
copy of a prefilled cache; a ratio is the median over rounds of a method's time to the plain time
of the same round, with its quartiles. Beside it stand the best rounds' ratio and that of CPU
times, which other work on the machine disturbs less. Prefill is timed by itself. Memory is
weights, plus the larger growth of the resident set, by the kernel's high-water mark, in prefill
and in decoding with its cache.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _machine import MIB, machine, peak_growth
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from flexalign.fusion import fuse
from flexalign.generation.two_model import PairCache, TwoModelDecoder
from flexalign.inra import ADAPTER, BASE, BOTH, InRaModel
from flexalign.models.pair import ModelPair

RESULTS = Path(__file__).parent / "results" / "inra.json"
SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
ROWS = [f"float32:{prompt}:{batch}" for prompt in (32, 512) for batch in (1, 4, 16)]
ROWS += [row.replace("float32", "bfloat16") for row in ROWS]
LAM = 0.5
TARGETS = {
    ("inra", "float32:32:1"): 1.2,
    ("inra", "float32:32:4"): 1.1,
    ("inra", "float32:32:16"): 1.35,
    ("inra", "float32:512:16"): 1.5,
} | {
    (name, row): most
    for name, most in (("λ=0", 1.03), ("λ=1", 1.08))
    for row in ROWS
    if row.startswith("float32")
}
"""The largest ratio of decoding time to plain that was aimed at."""


class TwoPasses(InRaModel):
    """The paper's way: one pass for each stream, every weight read twice a step."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PairCache | None = None,
        lam: Any = LAM,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return the fused logits of the last position."""
        logits = []
        caches = past_key_values.caches() if past_key_values else (None, None)
        for stream, cache in zip((BASE, ADAPTER), caches, strict=True):
            plan = self._plan(stream, input_ids, cache)
            inputs = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
            }
            logits.append(self.head(self._run(plan, cache, inputs)[:, -1:]))
        return CausalLMOutputWithPast(logits=fuse(*logits, lam), past_key_values=past_key_values)

    def _decoding_inputs(self, *_: Any) -> dict[str, Any]:
        return {}


@dataclass
class Method:
    """One way to decode: fill a cache with all tokens but the last, then generate."""

    prefill: Callable[[Tensor], Any]
    generate: Callable[..., Tensor]
    modules: list[nn.Module]

    def weights(self) -> int:
        """Bytes of its parameters, shared ones once."""
        parameters = {id(p): p for module in self.modules for p in module.parameters()}
        return sum(p.numel() * p.element_size() for p in parameters.values())


def decoder_prefill(model: Any) -> Callable[[Tensor], DynamicCache]:
    def prefill(tokens: Tensor) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model.get_decoder()(input_ids=tokens, past_key_values=cache, use_cache=True)
        return cache

    return prefill


def moved(parameters: Any) -> None:
    """Give what was copied values of its own."""
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)


def all_methods(dtype: torch.dtype) -> dict[str, Method]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(SHAPE).eval().to(dtype)
    aligned = copy.deepcopy(base)
    moved(aligned.parameters())
    inra = InRaModel.create(base)
    for layer in inra.adapter:
        moved(layer.self_attn.parameters())
        nn.init.normal_(layer.self_attn.o_proj.weight, std=0.01)
    passes = TwoPasses(base, inra.adapter, inra.inra_config)
    tokenizer: Any = SimpleNamespace(eos_token_id=None, pad_token_id=0)
    two = TwoModelDecoder(ModelPair(base, aligned, tokenizer, SHAPE.vocab_size))

    def stream(code: int, lam: float) -> Method:
        def generate(tokens: Tensor, **options: Any) -> Any:
            return inra.generate(tokens, lam=lam, **options)

        return Method(lambda tokens: inra.prefill(tokens, streams=code), generate, [inra])

    def passes_prefill(tokens: Tensor) -> PairCache:
        return PairCache(*(inra.prefill(tokens, streams=code) for code in (BASE, ADAPTER)))

    def pair_prefill(tokens: Tensor) -> PairCache:
        return PairCache(*(decoder_prefill(model)(tokens) for model in (base, aligned)))

    def by(model: Any) -> Callable[..., Any]:
        return lambda tokens, **options: model.generate(tokens, lam=LAM, **options)

    return {
        "plain": Method(decoder_prefill(base), base.generate, [base]),
        "inra": stream(BOTH, LAM),
        "two passes": Method(passes_prefill, by(passes), [passes]),
        "two models": Method(pair_prefill, by(two), [base, aligned]),
        "λ=0": stream(BASE, 0.0),
        "λ=1": stream(ADAPTER, 1.0),
    }


@torch.no_grad()
def measure(
    methods: dict[str, Method], row: str, rounds: int, prefills: int, new_tokens: int
) -> dict[str, dict[str, list[float]]]:
    """Let the methods take turns at one row; everything in seconds and MiB."""
    prompt, batch = (int(part) for part in row.split(":")[1:])
    tokens = torch.randint(3, SHAPE.vocab_size, (batch, prompt))
    options = {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }

    def decode(method: Method, cache: Any) -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        written = method.generate(tokens, past_key_values=cache, **options)
        times = time.perf_counter() - start, time.process_time() - cpu
        assert written.shape == (batch, prompt + new_tokens)
        return times

    found: dict[str, dict[str, list[float]]] = {
        name: {"decode": [], "decode_cpu": [], "prefill": [], "mib": []} for name in methods
    }
    caches: dict[str, Any] = {}
    for _ in range(prefills):
        for name, method in methods.items():
            with peak_growth() as grown:
                start = time.perf_counter()
                caches[name] = method.prefill(tokens[:, :-1])
                found[name]["prefill"].append(time.perf_counter() - start)
            found[name]["mib"] = [method.weights() / MIB + grown["mib"]]
    for name, method in methods.items():  # also warms up
        with peak_growth() as grown:
            decode(method, copy.deepcopy(caches[name]))
        whole = method.weights() / MIB + grown["mib"]
        found[name]["mib"] = [max(whole, *found[name]["mib"])]
    for _ in range(rounds):
        for name, method in methods.items():
            wall, cpu = decode(method, copy.deepcopy(caches[name]))
            found[name]["decode"].append(wall)
            found[name]["decode_cpu"].append(cpu)
    return found


def ratios(row: dict[str, Any], name: str, key: str) -> list[float]:
    """A method's times to the plain ones of the same rounds."""
    own, plain = row["methods"][name][key], row["methods"]["plain"][key]
    return [one / other for one, other in zip(own, plain, strict=True)]


def spread(values: list[float]) -> str:
    if len(values) < 3:
        return f"{statistics.median(values):.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def table(row: dict[str, Any], name: str) -> list[str]:
    """One row of the table as cells, after its name."""
    own = row["methods"][name]
    target = TARGETS.get((name, row["row"]))
    reached = statistics.median(ratios(row, name, "decode"))
    verdict = ""
    if target:
        verdict = f"≤ {target:g}: " + ("met" if reached <= target else "**not met**")
    return [
        name,
        str(len(own["decode"])),
        f"{1000 * statistics.median(own['decode']) / row['new_tokens']:.1f}",
        spread(ratios(row, name, "decode")),
        verdict,
        f"{min(own['decode']) / min(row['methods']['plain']['decode']):.2f}",
        f"{statistics.median(ratios(row, name, 'decode_cpu')):.2f}",
        f"{statistics.median(ratios(row, name, 'prefill')):.2f}",
        f"{statistics.median(ratios(row, name, 'mib')):.2f}",
    ]


HEADER = [
    "| dtype | prompt | batch | tokens | method | rounds | ms/step | time to plain (quartiles) "
    "| target | best round to best | CPU time to plain | prefill to plain | memory to plain |",
    "|---|--:|--:|--:|---|--:|--:|--:|---|--:|--:|--:|--:|",
]


def markdown(results: dict[str, Any]) -> str:
    lines = list(HEADER)
    for row in results["rows"]:
        facts = [*row["row"].split(":"), str(row["new_tokens"])]
        for name in row["methods"]:
            lines.append("| " + " | ".join([*facts, *table(row, name)]) + " |")
    facts = results["machine"]
    return (
        "# Decoding with the dial beside the plain model\n\n"
        f"`python benchmarks/inra.py`, the shape of SmolLM2-135M, torch {facts['torch']}, "
        f"{facts['cpu']}, {facts['threads']} threads. What the columns mean: the script's head.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def merge(results: dict[str, Any], row: dict[str, Any], add: bool) -> None:
    """Put a row in the place of the recorded one, or add its rounds to it."""
    rows: dict[str, dict[str, Any]] = {one["row"]: one for one in results["rows"]}
    old = rows.get(row["row"])
    if add and old is not None:
        if (old["new_tokens"], set(old["methods"])) != (row["new_tokens"], set(row["methods"])):
            raise SystemExit("rounds can be added to the same methods and tokens only.")
        for name, times in old["methods"].items():
            for key in ("decode", "decode_cpu", "prefill"):
                times[key] += row["methods"][name][key]
    else:
        rows[row["row"]] = row
    results["rows"] = [rows[name] for name in ROWS if name in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW")
    parser.add_argument("--methods", nargs="+", help="beside plain; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--add", action="store_true", help="add rounds to what is recorded")
    parser.add_argument("--quick", action="store_true", help="a small row, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.rows, arguments.rounds, arguments.new_tokens = ["float32:32:1"], 3, 16
    results = {"rows": []} if not RESULTS.exists() else json.loads(RESULTS.read_text())
    results["machine"] = machine()
    print("\n".join(HEADER), flush=True)
    for dtype in dict.fromkeys(row.split(":")[0] for row in arguments.rows):
        methods = all_methods(getattr(torch, dtype))
        if arguments.methods:
            methods = {name: methods[name] for name in ("plain", *arguments.methods)}
        for name in arguments.rows:
            if not name.startswith(dtype):
                continue
            found = measure(
                methods, name, arguments.rounds, arguments.prefills, arguments.new_tokens
            )
            row = {"row": name, "new_tokens": arguments.new_tokens, "methods": found}
            print(*(" | ".join([name, *table(row, one)]) for one in found), sep="\n", flush=True)
            if not arguments.quick:
                merge(results, row, arguments.add)
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                RESULTS.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
