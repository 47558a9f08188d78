"""The clients that people use, in an environment of their own: a chat, a stream, an effort."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from server_process import KEY, Server

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients/bin/python"
SCRIPT = Path(__file__).with_name("outside_client.py")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not (ROOT / ".venv-clients/installed").exists(),
        reason="the clients are not installed; make .venv-clients/installed does so",
    ),
]


@pytest.mark.parametrize("client", ["openai", "responses", "agents", "anthropic", "litellm"])
def test_a_client_chats_streams_and_turns_the_effort(client: str, server: Server):
    # litellm would look for prices on the network.
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [str(PYTHON), str(SCRIPT), client, server.root, KEY],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["whole"].strip()
    assert told["stream"] == told["whole"]
    assert told.get("final", told["whole"]) == told["whole"]
    assert told["low"].strip()
