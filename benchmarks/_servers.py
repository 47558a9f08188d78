"""What the serving benchmarks share: servers in processes of their own, and a cheap client."""

import asyncio
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Server:
    """A server of OpenAI's protocol, and its process."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def serving(command: Sequence[str], log: Path, threads: int, patience: float) -> Iterator[Server]:
    """Run a server until the block ends; ``{port}`` in the command is its port.

    It counts as up when ``/health`` answers 200 within ``patience`` seconds.
    """
    port = free_port()
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [part.format(port=port) for part in command],
            stdout=output,
            stderr=output,
            env=environment,
        )
    server = Server(process, port, log)
    try:
        wait_until_well(server, patience)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_well(server: Server, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(f"{server.root}/health", timeout=5):
                return
        except OSError:
            pass
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the server did not come up:\n{server.log.read_text()[-3000:]}")
        time.sleep(0.2)


@dataclass(frozen=True)
class Streamed:
    """One streamed answer: seconds to its first text, tokens as the server counts them."""

    first: float
    tokens: int


@dataclass(frozen=True)
class Exchange:
    """A request that has been sent, and the answer's beginning."""

    status: int
    reader: asyncio.StreamReader

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the JSON of every event of a stream."""
        async for line in self.reader:
            if line.startswith(b"data: {"):
                yield line[len(b"data: ") :]

    async def body(self) -> bytes:
        """Return the answer's body."""
        return (await self.reader.read()).partition(b"\r\n\r\n")[2]


@asynccontextmanager
async def sent(port: int, path: str, content: bytes) -> AsyncIterator[Any]:
    """Send a request by HTTP 1.0, whose answers have no frames; the block's end hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        head = f"POST {path} HTTP/1.0\r\nhost: 127.0.0.1:{port}\r\n"
        head += "content-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        yield reader
    finally:
        writer.close()


@asynccontextmanager
async def post(port: int, path: str, content: bytes) -> AsyncIterator[Exchange]:
    """Send a request and wait for the answer's status."""
    async with sent(port, path, content) as reader:
        yield Exchange(int((await reader.readline()).split()[1]), reader)


async def stream_completion(port: int, body: dict[str, Any]) -> Streamed:
    """Ask for a streamed completion; chunks are looked into only where they must be."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    start = time.perf_counter()
    first, counted, event = 0.0, b"", b""
    async with post(port, "/v1/completions", json.dumps(asked).encode()) as exchange:
        if exchange.status != 200:
            raise RuntimeError((await exchange.body()).decode())
        async for event in exchange.events():
            if not first and any(choice["text"] for choice in json.loads(event)["choices"]):
                first = time.perf_counter() - start
            if b'"completion_tokens"' in event:
                counted = event
    if not counted:
        raise RuntimeError(f"the stream broke off; its last event: {event.decode()}")
    return Streamed(first, json.loads(counted)["usage"]["completion_tokens"])
