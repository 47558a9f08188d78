"""A server in a process of its own, as a user starts it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from server_process import KEY, Server

_PROGRAM = ("-c", "from flexalign.cli.app import main; main()")


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Call ``flexalign serve ARGS… --port 0``; whatever still runs in the end is killed."""
    processes = []

    def start(*args: str, program: Sequence[str] = _PROGRAM, port: int = 0) -> Server:
        log = tmp_path_factory.mktemp("server") / "stderr"
        command = [sys.executable, *program, "serve", *args, "--port", str(port)]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "FLEXALIGN_TEST_KEY": KEY, "OMP_NUM_THREADS": "1"},
            )
        processes.append(process)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), log.read_text()
        return Server(process, url, log)

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def server(start_server: Any) -> Server:
    """The miniature with its dial, behind a key."""
    dial = ("miniature", "--adapter", "miniature:fast", "--lambda-range=-1,2")
    more = ("--queue", "40", "--api-key-env", "FLEXALIGN_TEST_KEY", "--playground")
    return start_server(*dial, *more)
