"""Run the command line with small shards, and be killed: ``cache_victim.py POINT:COUNT ARGS…``.

``before:3`` dies as the third file would be written, ``half:3`` with half of it on the disk,
``unnoted:3`` with the file but not its checksum, ``never:0`` not at all. The death is SIGKILL.
"""

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from flexalign.cli.app import main
from flexalign.training import cache
from flexalign.training.hidden_cache import fill, format

torch.set_num_threads(1)
cache.write_cache = functools.partial(fill.write_cache, shard_bytes=16_384)

point, _, number = sys.argv.pop(1).partition(":")
written = []
original = format.write_bytes


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write(path: Path, content: bytes) -> None:
    is_shard = path.suffix == ".safetensors"
    written.extend([path] if is_shard else [])
    due = len(written) == int(number)
    if due and is_shard and point == "before":
        _die()
    if due and is_shard and point == "half":
        path.with_name(f".{path.name}.partial").write_bytes(content[: len(content) // 2])
        _die()
    if due and not is_shard and point == "unnoted":
        _die()
    original(path, content)


def _patched(module: Any) -> None:
    module.write_bytes = _write


_patched(format)
main()
