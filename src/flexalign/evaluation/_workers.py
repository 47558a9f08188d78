"""Worker processes that can be killed: each comparison has a hard limit of time."""

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Timer
from time import monotonic
from typing import IO, cast

from flexalign.errors import ConfigError
from flexalign.evaluation._equality import READY, UNPARSED

__all__ = ["WorkerPool"]

_START_SECONDS = 120.0


class WorkerPool:
    """Compares answers in processes of its own, which are started when needed.

    A process that runs over the limit is killed and replaced; what it was asked counts as
    `UNPARSED`. One that dies is replaced and asked once more. Nothing else is lost. Safe to use
    from several threads.
    """

    def __init__(self, workers: int, seconds: float) -> None:
        """Make room for `workers` processes with `seconds` for each comparison."""
        self._seconds = seconds
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker())
        self._workers = workers

    def compare(self, found: str, expected: str) -> str:
        """One of `EQUAL`, `UNEQUAL` and `UNPARSED`."""
        worker = self._idle.get()
        try:
            return worker.ask(found, expected, self._seconds)
        finally:
            self._idle.put(worker)

    def compare_many(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The verdicts on pairs of a found and an expected answer, in order."""
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(lambda pair: self.compare(*pair), pairs))

    def close(self) -> None:
        """End all processes; a later comparison starts new ones."""
        workers = [self._idle.get() for _ in range(self._workers)]
        for worker in workers:
            worker.stop()
            self._idle.put(worker)


class _Worker:
    """One process, or the place of one that is not started yet."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, found: str, expected: str, seconds: float) -> str:
        """Ask once more if the process died before its time: that may not be the answer's fault."""
        request = json.dumps({"found": found, "expected": expected, "seconds": seconds}) + "\n"
        for _ in range(2):
            process = self._process or self._start()
            start = monotonic()
            reply = self._exchange(process, request, seconds)
            if reply:
                return reply
            if monotonic() - start >= seconds:
                break
        return UNPARSED

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flexalign.evaluation._equality"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        if self._exchange(process, "", _START_SECONDS) != READY:
            raise ConfigError(
                "the process that compares answers does not start; see why with: "
                f"{sys.executable} -P -m flexalign.evaluation._equality"
            )
        return process

    def _exchange(self, process: subprocess.Popen[str], request: str, seconds: float) -> str | None:
        """Send a request and read its reply; None if the process did not live to give one."""
        requests, replies = cast("tuple[IO[str], IO[str]]", (process.stdin, process.stdout))
        limit = Timer(seconds, process.kill)
        limit.daemon = True
        limit.start()
        try:
            requests.write(request)
            requests.flush()
            reply = replies.readline().strip()
        except OSError:
            reply = ""
        finally:
            limit.cancel()
        if not reply:
            self.stop()
        return reply or None
