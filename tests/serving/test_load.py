"""Seconds of the load that benchmarks/load.py puts on a server for minutes; what it leaves behind."""

import asyncio
import gc
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asgi import exchange
from flexalign.serving.app import create_app
from flexalign.serving.server import ServeOptions, load_service

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "load.py"
QUESTION = {"messages": [{"role": "user", "content": "3+14+15?"}], "max_tokens": 12}
KINDS: list[tuple[dict[str, Any], int | None]] = [
    ({"lambda": 0.3}, None),
    ({"lambda": 0.7, "stream": True, "n": 2}, None),
    ({"lambda": {"policy": "adaptive", "threshold": 0.9}}, None),
    ({"lambda": 1, "logprobs": True, "top_logprobs": 2, "stop": ["again"]}, None),
    ({"lambda": 0.5, "max_tokens": 300, "stream": True}, 2),
    ({"lambda": 9}, None),
]
"""What is asked, and after how many messages of the answer its client leaves, if it does."""


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

    async def ask_all() -> None:
        asked = [
            exchange(app, "/v1/chat/completions", QUESTION | more, leaves_after=messages)
            for more, messages in KINDS * 5
        ]
        await asyncio.gather(*asked)

    def held() -> int:
        asyncio.run(ask_all())
        gc.collect()
        return len(gc.get_objects())

    try:
        # A leak grows in every round; what other tests' threads make or free does not.
        rounds = [held() for _ in range(5)]
        grown = [after - before for before, after in itertools.pairwise(rounds)]
        assert min(grown) < 30, f"thirty requests left something each: {grown}"
        assert (service.engine.running, service.engine.waiting) == (0, 0)
    finally:
        service.engine.stop()
