"""Serving: tokens per second and time to the first text, the dial beside the plain model.

Run it from the repository:

    python benchmarks/serving.py                 # both models, all servers: 20 minutes
    python benchmarks/serving.py --worlds smollm2 --clients 16    # a part of it into the table
    python benchmarks/serving.py --worlds smollm2 --clients 16 --rounds 1 --add    # a round more
    python benchmarks/serving.py --quick         # the miniature, few requests, nothing written

Servers, each a process, all up at once and asked in turn:

* ``plain``: this server, the base model alone;
* ``inra``: this server, the base with an adapter, every request its own λ strictly inside (0, 1),
  so that all rows need both streams: the dearest mix there is;
* ``λ=0``: the same process, every request at λ = 0;
* ``transformers``: ``transformers serve`` on the base, one answer after the other;
* ``transformers, batching``: the same with its continuous batching;
* ``vllm``: vLLM's server on the base; ``vllm, inra``: vLLM with the dial (``serve --engine vllm``),
  λ as for ``inra``; both where make has built ``.venv-vllm``.

Worlds: ``miniature`` with its fast adapter, and ``smollm2``: the shape of SmolLM2-135M (30 layers,
width 576, vocabulary 49152) with random weights in float32. No token ends an answer, so that all
servers write equally many; decoding is greedy.

Each of 1, 4 and 16 clients streams its requests one after the other, by HTTP on the loopback, from
one process; a server's model has one core less than there are, which is left to the clients and the
event loops. A round lets every server in turn serve the same requests, λ apart; a ratio is the median
over rounds of its figure to ``plain``'s in the same round. CPU time is that of a server's processes;
other work on the machine disturbs it less.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from _machine import machine
from _servers import Server, serving, stream_completion
from dials import SHAPE, moved
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from flexalign.inra import InRaModel
from flexalign.miniature import folder
from flexalign.models.loading import load_model

RESULTS = Path(__file__).parent / "results" / "serving.json"
CLIENTS = (1, 4, 16)
TOKENS = {"miniature": 128, "smollm2": 64}
PROMPT_TOKENS = 32
LAMBDAS = (0.2, 0.35, 0.5, 0.65, 0.8)
AIM = ("inra", 16, 0.6)
"""The least tokens per second to ``plain``'s that was aimed at, for whom and at how many clients."""
SERVERS = ["plain", "inra", "λ=0", "transformers", "transformers, batching", "vllm", "vllm, inra"]
VLLM = Path(".venv-vllm/bin")


def save_worlds(world: str, target: Path) -> tuple[Path, Path]:
    """Write the base and the adapter to serve, with a tokenizer that ends nothing."""
    base, adapter = target / "base", target / "adapter"
    if world == "miniature":
        model = load_model("miniature")
        tokenizer = AutoTokenizer.from_pretrained(folder("reference"))
        adapter = folder("fast")
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(SHAPE).eval()
        words = {f"w{number}": number for number in range(SHAPE.vocab_size)}
        backend = Tokenizer(models.WordLevel(words, "w0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0")
    tokenizer.eos_token = None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    if world != "miniature":
        dial = InRaModel.create(str(base))
        for layer in dial.adapter:
            moved(layer.self_attn.parameters())
            nn.init.normal_(layer.self_attn.o_proj.weight, std=0.01)
        dial.save_pretrained(adapter)
    return base, adapter


def commands(base: Path, adapter: Path) -> dict[str, list[str]]:
    """The command of each server that can be run here."""
    programs = Path(sys.executable).parent
    port = ["--port", "{port}"]
    serve = ["serve", str(base), *port]
    ours = [str(programs / "flexalign"), *serve]
    theirs = [str(programs / "transformers"), *serve]
    theirs += ["--dtype", "float32", "--host", "127.0.0.1", "--device", "cpu"]
    dial = ["--adapter", str(adapter)]
    found = {
        "plain": ours,
        "inra": [*ours, *dial],
        "transformers": theirs,
        "transformers, batching": [*theirs, "--continuous-batching"],
    }
    if not VLLM.is_dir():
        print("vllm is left out: .venv-vllm is not built (make .venv-vllm/installed).")
        return found
    flags = ["--block-size", "32", "--max-num-seqs", "16", "--no-enable-prefix-caching"]
    length = ["--max-model-len", "512"]
    module = [str(VLLM / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    flexed = [str(VLLM / "flexalign"), *serve, *dial, "--engine", "vllm", "--dtype", "float32"]
    return found | {
        "vllm": [*module, "--model", str(base), *port, "--dtype", "float32", *length, *flags],
        "vllm, inra": [*flexed, "--context", "512", "--", *flags],
    }


def body(name: str, model: str, prompt: str, tokens: int, lam: float) -> dict[str, Any]:
    """A request as this server takes it."""
    asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    if name in ("inra", "vllm, inra"):
        return asked | {"lambda": lam}
    return asked | {"lambda": 0} if name == "λ=0" else asked


async def measure(
    server: Server, name: str, model: str, requests: list[list[tuple[str, float]]], tokens: int
) -> dict[str, Any]:
    """Let clients ask, each its requests in a row."""

    async def client(own: list[tuple[str, float]]) -> list[Any]:
        return [
            await stream_completion(server.port, body(name, model, prompt, tokens, lam))
            for prompt, lam in own
        ]

    start, cpu = time.perf_counter(), cpu_seconds(server)
    answers = [one for own in await asyncio.gather(*map(client, requests)) for one in own]
    seconds = time.perf_counter() - start
    short = [answer.tokens for answer in answers if answer.tokens != tokens]
    if short:
        raise RuntimeError(f"{name} wrote {short} tokens where {tokens} were asked for.")
    written = sum(answer.tokens for answer in answers)
    return {
        "tokens_per_second": written / seconds,
        "cpu_per_token": (cpu_seconds(server) - cpu) / written,
        "first": [answer.first for answer in answers],
    }


def cpu_seconds(server: Server) -> float:
    """CPU time of a server's processes so far."""
    own = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def draw_requests(
    world: str, clients: int, each: int, draw: random.Random
) -> list[list[tuple[str, float]]]:
    """Prompts and λ for every client; no two prompts are alike."""

    def prompt() -> str:
        if world == "miniature":
            return "+".join(str(draw.randrange(10)) for _ in range(PROMPT_TOKENS // 2)) + "?"
        return " ".join(f"w{draw.randrange(3, SHAPE.vocab_size)}" for _ in range(PROMPT_TOKENS))

    return [[(prompt(), draw.choice(LAMBDAS)) for _ in range(each)] for _ in range(clients)]


def measure_world(world: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Start the servers of a world and yield a row for each number of clients."""
    tokens, names = TOKENS[world], options.servers
    with TemporaryDirectory() as scratch, ExitStack() as running:
        base, adapter = save_worlds(world, Path(scratch))
        servers = {
            name: running.enter_context(
                serving(command, Path(scratch) / f"{name}.log", options.threads, 180)
            )
            for name, command in commands(base, adapter).items()
            if name in names
        }
        if "inra" in servers and "λ=0" in names:
            servers["λ=0"] = servers["inra"]
        draw = random.Random(0)
        for name, server in servers.items():
            asyncio.run(measure(server, name, str(base), draw_requests(world, 2, 1, draw), tokens))
        for clients in options.clients:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
            for _ in range(options.rounds):
                requests = draw_requests(world, clients, options.requests, draw)
                for name, server in servers.items():
                    one = asyncio.run(measure(server, name, str(base), requests, tokens))
                    found[name].append(one)
            yield {"world": world, "clients": clients, "tokens": tokens, "servers": found}


def ratio(row: dict[str, Any], name: str, key: str) -> float:
    """A server's figure to the plain one of the same rounds."""
    own, plain = row["servers"][name], row["servers"]["plain"]
    return statistics.median(a[key] / b[key] for a, b in zip(own, plain, strict=True))


def table(row: dict[str, Any]) -> list[str]:
    """A row's lines of the table, one for each server."""
    lines = []
    for name, rounds in row["servers"].items():
        speed = statistics.median(one["tokens_per_second"] for one in rounds)
        first = sorted(1000 * seconds for one in rounds for seconds in one["first"])
        late = first[min(len(first) - 1, int(0.95 * len(first)))]
        reached = ratio(row, name, "tokens_per_second")
        aim = ""
        if (name, row["clients"]) == AIM[:2]:
            aim = f"≥ {AIM[2]:g}: " + ("met" if reached >= AIM[2] else "**not met**")
        cells = [row["world"], str(row["clients"]), name, str(len(rounds)), f"{speed:.0f}"]
        cells += [f"{reached:.2f}", aim, f"{ratio(row, name, 'cpu_per_token'):.2f}"]
        cells += [f"{statistics.median(first):.0f}", f"{late:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


HEADER = [
    "| model | clients | server | rounds | tokens/s | to plain | aim | CPU time a token, to plain "
    "| first text p50, ms | p95, ms |",
    "|---|--:|---|--:|--:|--:|---|--:|--:|--:|",
]


def markdown(results: dict[str, Any]) -> str:
    facts = results["machine"]
    lines = [line for row in results["rows"] for line in table(row)]
    return (
        "# Serving the dial beside the plain model\n\n"
        f"`python benchmarks/serving.py`, torch {facts['torch']}, {facts['cpu']}, "
        f"{facts['cores']} cores, {results['threads']} threads a server, the clients on the same "
        "cores. What the columns mean: the script's head.\n\n" + "\n".join([*HEADER, *lines]) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", nargs="+", choices=list(TOKENS), default=list(TOKENS))
    parser.add_argument("--clients", nargs="+", type=int, choices=CLIENTS, default=CLIENTS)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=SERVERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1, help="of each client in a round")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--add", action="store_true", help="add rounds to what is recorded")
    parser.add_argument("--quick", action="store_true", help="few requests, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.worlds, options.rounds = ["miniature"], 1
    results = {"rows": []} if not RESULTS.exists() else json.loads(RESULTS.read_text())
    results |= {"machine": machine(), "threads": options.threads}
    print("\n".join(HEADER), flush=True)
    for world in options.worlds:
        for row in measure_world(world, options):
            print(*table(row), sep="\n", flush=True)
            if not options.quick:
                record(results, row, options.add)


def record(results: dict[str, Any], row: dict[str, Any], add: bool) -> None:
    """Put a row in the place of the recorded one, or add its rounds; write everything down."""
    rows = {(one["world"], one["clients"]): one for one in results["rows"]}
    key = row["world"], row["clients"]
    if add and key in rows:
        old = rows[key]["servers"]
        if set(old) != set(row["servers"]):
            raise SystemExit(f"rounds can be added for the same servers only: {', '.join(old)}.")
        row["servers"] = {name: old[name] + rounds for name, rounds in row["servers"].items()}
    rows[key] = row
    results["rows"] = [rows[world, n] for world in TOKENS for n in CLIENTS if (world, n) in rows]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
