"""``flexalign evaluate`` asks a running server what it asks a local dial, and finds the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from server_process import KEY, Server

COUNTED = ("tokens", "thinking_tokens", "rejected_tokens", "status", "route")

pytestmark = pytest.mark.slow


def test_a_server_is_measured_as_the_dial_it_serves(
    server: Server, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FLEXALIGN_TEST_KEY", KEY)
    asked = ["--task", "miniature", "--limit", "4", "-n", "2", "--lambda", "0,0.5,1"]
    asked += ["--policy", "adaptive 0.5", "--max-new-tokens", "120"]

    def samples(system: str, *more: str) -> list[Any]:
        output = tmp_path / system.partition(":")[0]
        result = run_cli("evaluate", f"same={system}", *asked, *more, "-o", output)
        assert result.exit_code == 0, result.stderr
        rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
        for row in rows:  # a message does not say whether its last thinking was closed
            row["response"] = row["response"].removesuffix("</think>")
        kept = ("setting", "question", "sample", "response", *COUNTED)
        return sorted([row[key] for key in kept] for row in rows)

    local = samples("dial:miniature,miniature:fast")
    assert len(local) == 4 * 4 * 2
    assert samples(f"url:{server.url}", "--api-key-env", "FLEXALIGN_TEST_KEY") == local
