"""A server of ours in a process of its own, which tests/serving/conftest.py starts."""

import subprocess
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

KEY = "sesame"
QUESTIONS = ["3+14+15?", "7+7+7?", "12+5+7+1?", "30+4+5+1+2?"]


class Server(NamedTuple):
    """A process, its address, and what it has said."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def root(self) -> str:
        """The address without ``/v1``."""
        return self.url.removesuffix("/v1")


def messages(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def whole(message: Any) -> str:
    """A message's text as the model wrote it."""
    if message.reasoning is None:
        return message.content
    return f"<think>{message.reasoning}</think>{message.content}"


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"{server.root}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name)
