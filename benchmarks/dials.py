"""Decoding with each dial beside the plain model: time, cache and memory as ratios to plain.

Run it from the repository:

    python benchmarks/dials.py                          # every row, hours on two cores
    python benchmarks/dials.py --rows float32:32:1      # one row (dtype:prompt:batch) into the table
    python benchmarks/dials.py --rows float32:32:1 --methods inra --add --rounds 3    # more rounds
    python benchmarks/dials.py --quick                  # a small row, nothing written

Methods, all by transformers' own ``generate``, greedy:

* ``plain``: the base model;
* ``lora``: a LoRA dial, rank 16 on all linear layers, another λ in every row of the batch;
* ``lora, λ=0``: the same dial where no low-rank term is needed;
* ``lora, kept merged``: the same dial with one λ in all rows, merged weights kept for it;
* ``lora, merged``: ``LoRADial.merged``, a plain model;
* ``PEFT``: PEFT's own forward of the same LoRA, which has one strength;
* ``PEFT, mixed batch``: four strengths as four adapters, and ``adapter_names=`` row by row;
* ``two prompts``: one model under two prompts of different lengths, λ = 0.5, both as rows of one
  batch;
* ``inra``: both streams as rows of one batch, λ = 0.5;
* ``two passes``: the paper's way, the base stream and then the adapter stream, each with its own
  cache and head product;
* ``two models``: equation 5 over two whole models;
* ``inra, λ=0``, ``inra, λ=1``: InRa where one stream is all that is needed.

The model has the shape of SmolLM2-135M (30 layers, width 576, vocabulary 49152) with random
weights; prompts are random tokens. A round decodes with every method in turn, each from its own
copy of a prefilled cache; a ratio is the median over rounds of a method's time to the plain time
of the same round, with its quartiles. Beside it stand the best rounds' ratio and that of CPU
times, which other work on the machine disturbs less. The targets are compared with the ratio of
CPU times where one thread runs, and of times where several do (which wait for each other). Prefill is timed by itself. Memory
is weights, plus the larger growth of the resident set, by the kernel's high-water mark, in prefill
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
from _machine import MIB, machine, peak_growth, unique, work_seconds
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from flexalign.fusion import fuse
from flexalign.generation.two_model import PairCache, TwoModelDecoder
from flexalign.generation.two_prompts import TwoPromptDecoder
from flexalign.inra import ADAPTER, BASE, BOTH, InRaModel
from flexalign.lora_dial import LoRADial, LoRADialConfig
from flexalign.miniature import SYSTEM
from flexalign.models.loading import load_tokenizer
from flexalign.models.pair import ModelPair
from flexalign.models.prompted import PairRendering, PromptPair, PromptSettings

RESULTS = Path(__file__).parent / "results" / "dials.json"
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
FEWER = 8
"""Tokens that an aligned prompt has less than the reference's, of two prompts."""

KEPT = 1.5
"""λ of the merged weights."""
STRENGTHS = ("at_half", "at_one", "at_two", "at_three")
"""PEFT's adapters, one for a strength."""
TARGETS = (
    {
        (name, row): most
        for name, most in (
            ("lora", 1.1),
            ("lora, λ=0", 1.02),
            ("lora, kept merged", 1.02),
            ("lora, merged", 1.02),
        )
        for row in ROWS
        if row.startswith("float32")
    }
    | {
        ("inra", "float32:32:1"): 1.2,
        ("inra", "float32:32:4"): 1.1,
        ("inra", "float32:32:16"): 1.35,
        ("inra", "float32:512:16"): 1.5,
    }
    | {
        (name, row): most
        for name, most in (("inra, λ=0", 1.03), ("inra, λ=1", 1.08))
        for row in ROWS
        if row.startswith("float32")
    }
)
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
    copied: int = 0
    """Bytes of weights that are no parameters."""

    def weights(self) -> int:
        """Bytes of its parameters, shared ones once."""
        parameters = {id(p): p for module in self.modules for p in module.parameters()}
        return self.copied + sum(p.nbytes for p in parameters.values())


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a cache's keys and values."""
    if isinstance(cache, PairCache):
        return sum(cache_bytes(one) for one in cache.caches())
    # A stream that no λ of the batch needs has layers that were never written.
    written = [layer for layer in cache.layers if layer.is_initialized]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in written)


def decoder_prefill(model: Any) -> Callable[[Tensor], DynamicCache]:
    """Fill a cache by all layers and without the head, whose product is the same for all methods."""

    def prefill(tokens: Tensor) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model.get_decoder()(input_ids=tokens, past_key_values=cache, use_cache=True)
        return cache

    return prefill


def with_lora(base: Any, *adapters: str) -> Any:
    """Return a copy of a base with LoRAs of one rank on all linear layers; both matrices random."""
    settings = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    first, *rest = adapters
    model = get_peft_model(copy.deepcopy(base), settings, adapter_name=first)
    for name in rest:
        model.add_adapter(name, copy.deepcopy(settings))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.01)
    return model.requires_grad_(False).eval()


def moved(parameters: Any) -> None:
    """Give what was copied values of its own."""
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)


def all_methods(
    dtype: torch.dtype, device: str = "cpu", shape: LlamaConfig = SHAPE
) -> dict[str, Method]:
    torch.manual_seed(0)
    with torch.device(device):
        base = LlamaForCausalLM(shape).eval().to(dtype)
    aligned = copy.deepcopy(base)
    moved(aligned.parameters())
    inra = InRaModel.create(base)
    for layer in inra.adapter:
        moved(layer.self_attn.parameters())
        nn.init.normal_(layer.self_attn.o_proj.weight, std=0.01)
    passes = TwoPasses(base, inra.adapter, inra.inra_config)
    tokenizer: Any = SimpleNamespace(eos_token_id=None, pad_token_id=0)
    two = TwoModelDecoder(ModelPair(base, aligned, tokenizer, shape.vocab_size))

    def stream(code: int, lam: float) -> Method:
        def generate(tokens: Tensor, **options: Any) -> Any:
            return inra.generate(tokens, lam=lam, **options)

        return Method(lambda tokens: inra.prefill(tokens, streams=code), generate, [inra])

    def passes_prefill(tokens: Tensor) -> PairCache:
        return PairCache(*(inra.prefill(tokens, streams=code) for code in (BASE, ADAPTER)))

    def pair_prefill(tokens: Tensor) -> PairCache:
        return PairCache(*(decoder_prefill(model)(tokens) for model in (base, aligned)))

    dial = LoRADial(with_lora(base, "default"), LoRADialConfig("", "", lambda_range=(0.0, 5.0)))
    dial.requires_grad_(False).eval()
    merged = dial.merged(KEPT)
    dial.merge(KEPT)
    adapted = sum(layer.base_layer.weight.nbytes for layer in dial.scale.layers.values())
    peft = with_lora(base, *STRENGTHS)
    peft.set_adapter(STRENGTHS[0])

    def lora(lams: Callable[[int], Any], copied: int = 0) -> Method:
        def fill(tokens: Tensor) -> Any:
            with dial.projections.at(lams(len(tokens)), *tokens.shape):
                return decoder_prefill(dial.base)(tokens)

        def generate(tokens: Tensor, **options: Any) -> Any:
            return dial.generate(tokens, lam=lams(len(tokens)), **options)

        return Method(fill, generate, [dial], copied)

    def names(rows: int) -> list[str]:
        return [STRENGTHS[row % len(STRENGTHS)] for row in range(rows)]

    def peft_generate(tokens: Tensor, **options: Any) -> Any:
        return peft.generate(input_ids=tokens, adapter_names=names(len(tokens)), **options)

    prompts = PromptPair(aligned=PromptSettings(system=SYSTEM))
    prompted = TwoPromptDecoder(base, PairRendering(load_tokenizer("miniature:hybrid"), prompts))

    def aligned_inputs(tokens: Tensor) -> dict[str, Tensor]:
        """The aligned prompts: other tokens, and fewer by a few."""
        mask = torch.ones_like(tokens)
        mask[:, :FEWER] = 0
        return {"aligned_ids": tokens.roll(1, 1), "aligned_mask": mask}

    def prompted_prefill(tokens: Tensor) -> Any:
        return prompted.prefill(tokens, torch.ones_like(tokens), **aligned_inputs(tokens))

    def prompted_generate(tokens: Tensor, **options: Any) -> Any:
        return prompted.generate(tokens, lam=LAM, **aligned_inputs(tokens), **options)

    def by(model: Any) -> Callable[..., Any]:
        return lambda tokens, **options: model.generate(tokens, lam=LAM, **options)

    return {
        "plain": Method(decoder_prefill(base), base.generate, [base]),
        "lora": lora(lambda rows: torch.linspace(0.5, 3.0, rows)),
        "lora, λ=0": lora(lambda _: 0.0),
        "lora, kept merged": lora(lambda _: KEPT, adapted),
        "lora, merged": Method(decoder_prefill(merged), merged.generate, [merged]),
        "PEFT": Method(decoder_prefill(peft.get_base_model()), peft.generate, [peft]),
        "PEFT, mixed batch": Method(decoder_prefill(peft.get_base_model()), peft_generate, [peft]),
        "two prompts": Method(prompted_prefill, prompted_generate, [base]),
        "inra": stream(BOTH, LAM),
        "two passes": Method(passes_prefill, by(passes), [passes]),
        "two models": Method(pair_prefill, by(two), [base, aligned]),
        "inra, λ=0": stream(BASE, 0.0),
        "inra, λ=1": stream(ADAPTER, 1.0),
    }


@torch.no_grad()
def measure(
    methods: dict[str, Method],
    row: str,
    rounds: int,
    prefills: int,
    new_tokens: int,
    device: str = "cpu",
) -> dict[str, dict[str, list[float]]]:
    """Let the methods take turns at one row; everything in seconds and MiB."""
    prompt, batch = (int(part) for part in row.split(":")[1:])
    vocabulary = methods["plain"].modules[0].config.vocab_size
    tokens = torch.randint(3, vocabulary, (batch, prompt), device=device)
    options = {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }

    def decode(method: Method, cache: Any) -> tuple[float, float]:
        cpu, start = work_seconds(device), time.perf_counter()
        written = method.generate(tokens, past_key_values=cache, **options)
        worked = work_seconds(device) - cpu  # on a GPU it waits for what is queued
        times = time.perf_counter() - start, worked
        assert written.shape == (batch, prompt + new_tokens)
        return times

    found: dict[str, dict[str, list[float]]] = {
        name: {"decode": [], "decode_cpu": [], "prefill": [], "mib": [], "cache": []}
        for name in methods
    }
    caches: dict[str, Any] = {}
    for _ in range(prefills):
        for name, method in methods.items():
            with peak_growth(device) as grown:
                work_seconds(device)
                start = time.perf_counter()
                caches[name] = method.prefill(tokens[:, :-1])
                work_seconds(device)
                found[name]["prefill"].append(time.perf_counter() - start)
            found[name]["mib"] = [method.weights() / MIB + grown["mib"]]
            found[name]["cache"] = [cache_bytes(caches[name]) / MIB]
    for name, method in methods.items():  # also warms up
        with peak_growth(device) as grown:
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


def best(row: dict[str, Any], name: str, key: str) -> str:
    """A method's best round to the best plain one."""
    return f"{min(row['methods'][name][key]) / min(row['methods']['plain'][key]):.2f}"


def spread(values: list[float]) -> str:
    if len(values) < 3:
        return f"{statistics.median(values):.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def table(row: dict[str, Any], name: str) -> list[str]:
    """One row of the table as cells, after its name."""
    own = row["methods"][name]
    target = TARGETS.get((name, row["row"]))
    reached = statistics.median(
        ratios(row, name, "decode_cpu" if row["threads"] == 1 else "decode")
    )
    verdict = ""
    if target:
        verdict = f"≤ {target:g}: " + ("met" if reached <= target else "**not met**")
    return [
        name,
        str(len(own["decode"])),
        f"{1000 * statistics.median(own['decode']) / row['new_tokens']:.1f}",
        spread(ratios(row, name, "decode")),
        spread(ratios(row, name, "decode_cpu")),
        verdict,
        best(row, name, "decode"),
        best(row, name, "decode_cpu"),
        f"{statistics.median(ratios(row, name, 'prefill')):.2f}",
        f"{statistics.median(ratios(row, name, 'mib')):.2f}",
        f"{ratios(row, name, 'cache')[0]:.2f}" if "cache" in own else "",
    ]


HEADER = [
    "| dtype | prompt | batch | threads | tokens | method | rounds | ms/step "
    "| time to plain (quartiles) | CPU time to plain (quartiles) | target | best round to best "
    "| the same of CPU times | prefill to plain | memory to plain | cache to plain |",
    "|---|--:|--:|--:|--:|---|--:|--:|---|---|---|--:|--:|--:|--:|--:|",
]


def markdown(results: dict[str, Any]) -> str:
    """The tables, one for each machine that rows were measured on."""
    parts = [
        "# Decoding with each dial beside the plain model",
        "`python benchmarks/dials.py`, the shape of SmolLM2-135M. "
        "What the columns mean: the script's head.",
    ]
    for facts in unique(row["machine"] for row in results["rows"]):
        title = f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}"
        parts.append(f"## {title}")
        lines = list(HEADER)
        for row in results["rows"]:
            if row["machine"] == facts:
                cells = [*row["row"].split(":"), str(row["threads"]), str(row["new_tokens"])]
                for name in row["methods"]:
                    lines.append("| " + " | ".join([*cells, *table(row, name)]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def merge(results: dict[str, Any], row: dict[str, Any], add: bool) -> None:
    """Put a row in the place of the one recorded on this machine, or add its rounds to it."""
    rows: dict[tuple[str, str], dict[str, Any]] = {place(one): one for one in results["rows"]}
    old = rows.get(place(row))
    if add and old is not None:
        if any(old[key] != row[key] for key in ("new_tokens", "threads")) or set(
            old["methods"]
        ) != set(row["methods"]):
            raise SystemExit("rounds can be added to the same methods, tokens and threads only.")
        for name, times in old["methods"].items():
            for key in ("decode", "decode_cpu", "prefill"):
                times[key] += row["methods"][name][key]
    else:
        rows[place(row)] = row
    results["rows"] = sorted(rows.values(), key=lambda one: ROWS.index(one["row"]))


def place(row: dict[str, Any]) -> tuple[str, str]:
    """What tells rows apart: dtype, prompt and batch, and the processor."""
    return row["row"], row["machine"]["cpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW")
    parser.add_argument("--methods", nargs="+", help="beside plain; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file of the rows")
    parser.add_argument("--add", action="store_true", help="add rounds to what is recorded")
    parser.add_argument("--quick", action="store_true", help="a small row, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.rows, arguments.rounds, arguments.new_tokens = ["float32:32:1"], 3, 16
    path: Path = arguments.results
    results = {"rows": []} if not path.exists() else json.loads(path.read_text())
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
            row = {
                "row": name,
                "machine": machine(),
                "threads": arguments.threads,
                "new_tokens": arguments.new_tokens,
                "methods": found,
            }
            print(*(" | ".join([name, *table(row, one)]) for one in found), sep="\n", flush=True)
            if not arguments.quick:
                merge(results, row, arguments.add)
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
                path.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
