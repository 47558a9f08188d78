"""Seconds of the load that benchmarks/load.py puts on a server for minutes; what it leaves behind."""

import asyncio
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexalign.serving.app import create_app
from flexalign.serving.load import ServeOptions, load_service

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "load.py"
QUESTION = {"messages": [{"role": "user", "content": "3+14+15?"}], "max_tokens": 12}
KINDS: list[tuple[dict[str, Any], bool]] = [
    ({"lambda": 0.3}, False),
    ({"lambda": 0.7, "stream": True, "n": 2}, False),
    ({"lambda": {"policy": "adaptive", "threshold": 0.9}}, False),
    ({"lambda": 1, "logprobs": True, "top_logprobs": 2, "stop": ["again"]}, False),
    ({"lambda": 0.5, "max_tokens": 300, "stream": True}, True),
    ({"lambda": 9}, False),
]
"""What is asked, and whether its client leaves."""


@pytest.mark.full
def test_nothing_is_wrong_lost_or_uncounted_under_mixed_load(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--minutes", "0.33", "--spot-checks", "60"]
    command += ["--output", str(tmp_path / "load.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| failures | 0 |" in (tmp_path / "load.md").read_text()


@pytest.mark.slow
def test_requests_leave_no_object_behind():
    if sys.gettrace() is not None:
        pytest.skip("coverage keeps objects of its own for every thread")
    service, rules = load_service(ServeOptions("miniature", "miniature:fast"))
    app = create_app(service, rules)

    async def ask(more: dict[str, Any], leaves: bool) -> None:
        parts = [{"type": "http.request", "body": json.dumps(QUESTION | more).encode()}]
        gone = asyncio.Event()

        async def receive() -> Any:
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if leaves and message.get("body"):
                gone.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
        scope |= {"headers": headers}
        await app({**scope, "query_string": b"", "root_path": ""}, receive, send)

    async def ask_all() -> None:
        await asyncio.gather(*(ask(*kind) for kind in KINDS * 5))

    def held() -> int:
        asyncio.run(ask_all())
        gc.collect()
        return len(gc.get_objects())

    try:
        held()
        before = held()
        assert abs(held() - before) < 30, "thirty requests left something each"
        assert (service.engine.running, service.engine.waiting) == (0, 0)
    finally:
        service.engine.stop()
