"""Command lines that start at once, without the seconds that the imports take."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


class Lived(NamedTuple):
    """How a command ended, after how many seconds, and what it printed."""

    code: int
    seconds: float
    log: str


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Lived]]:
    """Run a command line in a fork of a warm process."""
    log = tmp_path_factory.mktemp("nursery") / "log"
    command = [sys.executable, str(Path(__file__).with_name("nursery.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:
        assert nursery.stdout.readline() == "ready\n"

        def start(arguments: list[str], seconds: float | None = None) -> Lived:
            order = {"arguments": arguments, "log": str(log), "seconds": seconds}
            print(json.dumps(order), file=nursery.stdin, flush=True)
            answer = json.loads(nursery.stdout.readline())
            return Lived(answer["code"], answer["seconds"], log.read_text("utf-8", "replace"))

        yield start
        nursery.stdin.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system; its size is in KiB."""
    mounted = []

    def mount(*options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            # Some systems have none; a full disk cannot be had without it.
            pytest.skip("there is no mount command here")
        if done.returncode:
            # Mounting needs root; a full disk cannot be had without it.
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
