"""Command lines that start at once, and are killed at a given moment: a process that forks them.

Reads one JSON object a line: ``{"arguments": […], "log": PATH, "seconds": S or null}``. Each is run by
a child that finds everything imported, and is sent SIGKILL after S seconds. Answers with
``{"code": its exit status, negative for a signal, "seconds": how long it lived}``.
"""

import functools
import json
import os
import signal
import sys
import time
from typing import Any, NoReturn

import torch

import flexalign.cli.evaluate
import flexalign.evaluation.sweep
import flexalign.training.realignment  # noqa: F401
from flexalign.cli.app import main
from flexalign.training import cache
from flexalign.training.hidden_cache import fill

torch.set_num_threads(1)
cache.write_cache = functools.partial(fill.write_cache, shard_bytes=16_384)


def _be(arguments: list[str], log: str) -> NoReturn:
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["flexalign", *arguments]
    code: Any = 1
    try:
        main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(child: int, seconds: float | None) -> tuple[int, float]:
    start = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        lived = time.monotonic() - start
        if done:
            return os.waitstatus_to_exitcode(status), lived
        if seconds is not None and lived >= seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
        time.sleep(0.002)


print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        _be(order["arguments"], order["log"])
    code, lived = _watch(child, order["seconds"])
    print(json.dumps({"code": code, "seconds": lived}), flush=True)
