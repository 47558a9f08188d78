"""A server of ours in a process of its own; tests/serving/conftest.py starts it."""

import subprocess
from pathlib import Path
from typing import NamedTuple

KEY = "sesame"


class Server(NamedTuple):
    """A process, its address, and what it has said."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def root(self) -> str:
        """The address without ``/v1``."""
        return self.url.removesuffix("/v1")
