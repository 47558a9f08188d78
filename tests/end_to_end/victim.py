"""Run the command line and be killed at a given point: ``victim.py POINT:COUNT ARGS…``.

``step:5`` dies at the beginning of the fifth forward pass, ``weights:2`` and ``optimizer:2`` with
half of that file of the second checkpoint on the disk, ``manifest:1`` with everything of the first
checkpoint but its manifest, ``never:0`` not at all. With ``@1`` after it only the second of several
processes dies. The death is SIGKILL: nothing is cleaned up.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from flexalign.cli.app import main
from flexalign.training import checkpoints
from flexalign.training.trainer import TrRaTrainer

torch.set_num_threads(1)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _wrap(owner: Any, name: str, count: int, act: Callable[..., None], *, after: bool) -> None:
    original, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        due = len(calls) == count
        if due and not after:
            act(*args)
        result = original(*args, **kwargs)
        if due and after:
            act(*args)
        return result

    setattr(owner, name, wrapped)


def _half_of(pattern: str) -> Callable[..., None]:
    def act(trainer: Any, folder: str, *rest: Any) -> None:
        [path] = Path(folder).glob(pattern)
        _halve(path)
        _die()

    return act


point, _, number = sys.argv.pop(1).partition(":")
number, _, rank = number.partition("@")
if rank and rank != os.environ["RANK"]:
    point = "never"
if point == "step":
    _wrap(TrRaTrainer, "training_step", int(number), lambda *args: _die(), after=False)
elif point == "weights":
    _wrap(PreTrainedModel, "save_pretrained", int(number), _half_of("*.safetensors"), after=True)
elif point == "optimizer":
    half = _half_of("optimizer.pt")
    _wrap(Trainer, "_save_optimizer_and_scheduler", int(number), half, after=True)
elif point == "manifest":
    _wrap(checkpoints, "seal", int(number), lambda *args: _die(), after=False)
main()
