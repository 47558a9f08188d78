"""The stages of every training run: go on from what is whole, train, publish the result."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from transformers import ProgressCallback
from transformers.trainer_callback import PrinterCallback

from flexalign.errors import CheckpointError, FlexAlignError
from flexalign.trra.callbacks import StopOnSignal
from flexalign.trra.checkpoints import MANIFEST, Found, newest_complete, seal, what_stands, writing

__all__ = [
    "Stopped",
    "drop_broken",
    "is_last",
    "one_process",
    "publish",
    "train_onwards",
    "trainer_state",
]

# What a checkpoint holds beside the model: the trainer's own state, FSDP's and DeepSpeed's.
_TRAINER_FILES = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "pytorch_model_fsdp*",
    "global_step*",
    "latest",
    "zero_to_*.py",
    "trainer_state.json",
    "training_args.bin",
    MANIFEST,
)


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run after a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


@contextmanager
def one_process() -> Iterator[bool]:
    """Tell the first of several processes that it is; all leave the block together."""
    state = PartialState()
    state.wait_for_everyone()
    yield state.is_main_process
    state.wait_for_everyone()


def drop_broken(found: Found, say: Callable[[str], None]) -> None:
    """Remove checkpoints that cannot be used, and say why."""
    for path, reason in found.passed_over:
        say(f"passed over {path}: {reason}")
        shutil.rmtree(path, ignore_errors=True)


def train_onwards(trainer: Any, found: Found, stop: StopOnSignal) -> Path:
    """Train from a checkpoint, or from the start, to the end; return the last checkpoint.

    Args:
        trainer: A trainer with sealed checkpoints, which has `stop` among its callbacks.
        found: The newest complete checkpoint of its output folder, if there is one.
        stop: Ends training early on a signal.

    Raises:
        Stopped: If it did.
        CheckpointError: If there is no checkpoint at the end, or another process is lost.
    """
    for printer in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
    output = Path(trainer.args.output_dir)
    with stop.listening(), _together(output):
        trainer.train(resume_from_checkpoint=str(found.path) if found.path else None)
    checkpoint = newest_complete(output).path
    if checkpoint is None:
        raise CheckpointError(f"training ended without a checkpoint in {output}.")
    if stop.requested and not is_last(checkpoint):
        raise Stopped(checkpoint)
    return checkpoint


@contextmanager
def _together(output: Path) -> Iterator[None]:
    """Turn the loss of another process of the run into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FlexAlignError) or not _is_lost_connection(error):
            raise
        raise CheckpointError(
            f"another process of this run ended or cannot be reached "
            f"({' '.join(str(error).split())[:200]}); {what_stands(output)}: start all processes again, "
            "the run goes on from there."
        ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    # Gloo's are plain RuntimeErrors that begin with the place in its source.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def publish(checkpoint: Path, output: Path, card: str, **facts: Any) -> None:
    """Make the run's folder a complete model: weights, tokenizer, card, manifest with facts.

    Raises:
        CheckpointError: If the folder cannot be written to.
    """
    with writing("the model", output):
        leave_out = shutil.ignore_patterns(*_TRAINER_FILES)
        shutil.copytree(checkpoint, output, ignore=leave_out, dirs_exist_ok=True)
        (output / "README.md").write_text(card, encoding="utf-8")
        seal(output, **facts)


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read the trainer's state out of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return state


def is_last(checkpoint: Path) -> bool:
    """Whether nothing is left to train after a checkpoint."""
    state = trainer_state(checkpoint)
    return bool(state["global_step"] >= state["max_steps"])
