"""The stages of a run, played without training: what is said when a run does not end as it should."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from flexalign.errors import CheckpointError, ConfigError
from flexalign.training.callbacks import StopOnSignal
from flexalign.training.checkpoints import Found, seal
from flexalign.training.run import train_onwards


def play(output: Path, error: Exception | None = None) -> None:
    """Train with a trainer that ends at once, or with an error."""

    def train(**_: Any) -> None:
        if error is not None:
            raise error

    args = SimpleNamespace(output_dir=str(output))
    trainer = SimpleNamespace(args=args, train=train, remove_callback=lambda callback: None)
    train_onwards(trainer, Found(None, ()), StopOnSignal())


def checkpoint(output: Path, step: int) -> None:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")
    seal(folder)


def test_a_run_without_a_checkpoint_in_the_end_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ended without a checkpoint in"):
        play(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534]\nConnection closed"
        ),
        dist.DistBackendError("NCCL communicator was aborted"),
    ],
)
def test_a_lost_process_is_one_sentence_that_says_what_stands(
    tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(CheckpointError, match="there is no complete checkpoint yet: start all"):
        play(tmp_path, error)
    checkpoint(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"another process.*checkpoint-4 stands") as caught:
        play(tmp_path, error)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), CheckpointError("full"), ConfigError("no")]
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        play(tmp_path, error)
    assert caught.value is error
