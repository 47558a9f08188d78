"""Minutes of mixed load on the local engine: is anything wrong, lost, leaked or not counted?

    python benchmarks/load.py --minutes 10       # ends with status 1 if a check fails
    python benchmarks/load.py --minutes 0.5 --output /tmp/load.md      # a look

A server of the miniature with its fast adapter is asked by 12 clients, without a pause: chats and
completions, streamed and whole, λ from −1 to 2, schedules and policies among them, 1 to 150 tokens,
one or three choices, greedy and sampled, with stop texts and log-probabilities; 10 % are left by
their clients in the middle, 5 % are malformed. It is checked that

* every request is answered with the status it is to have;
* an answer in so many (400 in all, drawn at random) is the one that the library writes for it alone;
* the server's resident memory after the first fifth of the time (by its median over a tenth) is
  that of the last tenth, within 5 % (in a run of five minutes or more: before, caches and the
  allocator's pools still fill);
* ``/metrics`` counts every request by path and status, every λ, every way of a policy, every client
  that left an answer, and no fewer tokens than the answers have; nothing runs or waits in the end.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _load_requests import LAMBDA_RANGE, Asked, draw_request, wrong_answers
from _machine import MIB, machine, resident
from _servers import Exchange, Server, post, sent, serving

REPORT = Path(__file__).parent / "results" / "load.md"
CLIENTS = 12
FLAT = 0.05
LEAST_MINUTES = 5


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        statuses: How often each (path, status) came.
        unexpected: A line for each request that was answered otherwise than it is to be.
        answers: Whole answers: the request, its first choice's text, the λ told.
        tokens: Tokens of whole answers, as usage counts them.
        left: Choices of requests whose clients left.
        numbers: Requests with a number for λ that were let in.
        routed: Choices of whole answers under policies.
        rss: (seconds, bytes) of the server's resident memory.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    answers: list[tuple[Asked, str, Any]] = field(default_factory=list)
    tokens: int = 0
    left: int = 0
    numbers: int = 0
    routed: int = 0
    rss: list[tuple[float, int]] = field(default_factory=list)


async def ask(port: int, asked: Asked, draw: random.Random, seen: Seen) -> None:
    """Send a request, hear its answer, or some of it, and note what came."""
    if asked.leaves:
        await leave(port, asked, draw)
        seen.statuses[asked.path, 200] += 1
        seen.left += asked.body["n"]
        seen.numbers += isinstance(asked.dial, float)
        return
    async with post(port, asked.path, asked.content) as exchange:
        seen.statuses[asked.path, exchange.status] += 1
        if exchange.status != asked.status:
            seen.unexpected.append(f"{exchange.status}: {asked.body} {await exchange.body()!r}")
        elif asked.status == 200:
            told, text = await whole(exchange, asked)
            seen.tokens += told["usage"]["completion_tokens"]
            seen.numbers += isinstance(asked.dial, float)
            seen.routed += asked.body["n"] * (told["dial"]["route"] is not None)
            seen.answers.append((asked, text, told["dial"]["lambda"]))


async def leave(port: int, asked: Asked, draw: random.Random) -> None:
    """Hang up on an answer: after some events of a stream, after some time otherwise."""
    async with sent(port, asked.path, asked.content) as reader:
        if not asked.body["stream"]:
            await asyncio.sleep(draw.uniform(0.005, 0.05))
            return
        count = draw.randrange(5)
        async for line in reader:
            count -= line.startswith(b"data: ")
            if count < 0:
                return


async def whole(exchange: Exchange, asked: Asked) -> tuple[dict[str, Any], str]:
    """Return what is told of an answer, and its first choice's text."""
    if not asked.body["stream"]:
        told = json.loads(await exchange.body())
        return told, text_of(told["choices"][0], "message")
    told, text = {}, ""
    async for event in exchange.events():
        chunk = json.loads(event)
        told |= {key: chunk[key] for key in ("dial", "usage") if key in chunk}
        text += "".join(text_of(one, "delta") for one in chunk["choices"] if one["index"] == 0)
    return told, text


def text_of(choice: dict[str, Any], key: str) -> str:
    if key not in choice:
        return str(choice["text"])
    return "".join(choice[key].get(part) or "" for part in ("reasoning", "content"))


async def load(server: Server, seconds: float, seed: int) -> Seen:
    """Let the clients ask until the time is over."""
    seen, start = Seen(), time.monotonic()

    async def client(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        while time.monotonic() - start < seconds:
            await ask(server.port, draw_request(draw), draw, seen)

    async def watch() -> None:
        while time.monotonic() - start < seconds:
            seen.rss.append((time.monotonic() - start, resident("VmRSS", server.process.pid)))
            await asyncio.sleep(min(1, seconds / 100))

    await asyncio.gather(watch(), *map(client, range(CLIENTS)))
    return seen


def read_metrics(server: Server) -> dict[str, float]:
    """Return the metrics, once nothing runs or waits any more."""
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"{server.root}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        found = {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }
        is_idle = found["flexalign_running"] + found["flexalign_waiting"] == 0
        if is_idle or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def check_counts(seen: Seen, metrics: dict[str, float]) -> list[str]:
    """Return a line for each thing that the metrics do not count as the clients do."""
    wrong = []
    for (path, status), count in seen.statuses.items():
        name = f'flexalign_requests_total{{path="{path}",status="{status}"}}'
        if metrics.get(name) != count:
            wrong.append(f"{name} is {metrics.get(name)}, and {count} were asked")
    listed = [value for name, value in metrics.items() if name.startswith("flexalign_requests_t")]
    posts = sum(seen.statuses.values())
    if not posts <= sum(listed) <= posts + 1000:
        wrong.append(f"{sum(listed):.0f} requests counted, {posts} asked")
    if metrics["flexalign_lambda_count"] != seen.numbers:
        wrong.append(f"{metrics['flexalign_lambda_count']:.0f} λ counted, {seen.numbers} asked")
    routes = sum(value for name, value in metrics.items() if name.startswith("flexalign_routes_t"))
    if not seen.routed <= routes <= seen.routed + seen.left:
        wrong.append(f"{routes:.0f} ways counted, {seen.routed} told")
    if not 0 < metrics["flexalign_cancelled_total"] <= seen.left:
        wrong.append(f"{metrics['flexalign_cancelled_total']:.0f} left answers, {seen.left} left")
    if metrics["flexalign_generated_tokens_total"] < seen.tokens:
        wrong.append(f"{metrics['flexalign_generated_tokens_total']:.0f} tokens, {seen.tokens} had")
    for name in ("flexalign_running", "flexalign_waiting"):
        if metrics[name]:
            wrong.append(f"{name} is {metrics[name]:.0f} when all is over")
    return wrong


def memory(rss: list[tuple[float, int]]) -> tuple[float, float]:
    """Return the median MiB of the tenth after the first fifth, and of the last tenth."""
    end = rss[-1][0]

    def median(low: float, high: float) -> float:
        return statistics.median(b for at, b in rss if low * end <= at <= high * end) / MIB

    return median(0.2, 0.3), median(0.9, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spot-checks", type=int, default=400)
    parser.add_argument("--output", type=Path, default=REPORT)
    options = parser.parse_args()
    command = [str(Path(sys.executable).parent / "flexalign"), "serve", "miniature"]
    command += ["--adapter", "miniature:fast", "--lambda-range={:g},{:g}".format(*LAMBDA_RANGE)]
    with TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        with serving([*command, "--port", "{port}"], log, 1, 120) as server:
            seen = asyncio.run(load(server, 60 * options.minutes, options.seed))
            metrics = read_metrics(server)
        if server.process.returncode or "Traceback" in log.read_text():
            seen.unexpected.append(f"the server's log: {log.read_text()[-2000:]}")
    draw = random.Random(options.seed)
    checked = draw.sample(seen.answers, min(options.spot_checks, len(seen.answers)))
    before, after = memory(seen.rss)
    failures = seen.unexpected + wrong_answers(checked) + check_counts(seen, metrics)
    if options.minutes >= LEAST_MINUTES and abs(after / before - 1) > FLAT:
        failures.append(f"the resident memory went from {before:.0f} to {after:.0f} MiB")
    text = report(options, seen, metrics, len(checked), (before, after), failures)
    print(text)
    options.output.write_text(text, encoding="utf-8")
    sys.exit(bool(failures))


def report(
    options: argparse.Namespace,
    seen: Seen,
    metrics: dict[str, float],
    checked: int,
    rss: tuple[float, float],
    failures: list[str],
) -> str:
    facts, posts = machine(), sum(seen.statuses.values())
    counts = Counter[int]()
    for (_, status), count in seen.statuses.items():
        counts[status] += count
    rows = [
        ("requests", f"{posts} ({posts / options.minutes / 60:.0f} a second)"),
        ("by status", ", ".join(f"{status}: {n}" for status, n in sorted(counts.items()))),
        ("answers whose clients left", f"{metrics['flexalign_cancelled_total']:.0f} unfinished"),
        ("tokens written", f"{metrics['flexalign_generated_tokens_total']:.0f}"),
        ("answers held against those written alone", str(checked)),
        ("resident memory after a fifth of the time", f"{rss[0]:.0f} MiB"),
        ("resident memory at the end", f"{rss[1]:.0f} MiB ({rss[1] / rss[0] - 1:+.1%})"),
        ("failures", str(len(failures))),
    ]
    return (
        "# Mixed load on the local engine\n\n"
        f"`python benchmarks/load.py --minutes {options.minutes:g}`, {CLIENTS} clients, torch "
        f"{facts['torch']}, {facts['cpu']}, one thread for the model. What is checked: the "
        "script's head.\n\n| | |\n|---|---|\n"
        + "".join(f"| {name} | {value} |\n" for name, value in rows)
        + "".join(f"\n- {failure[:500]}" for failure in failures[:20])
    )


if __name__ == "__main__":
    main()
