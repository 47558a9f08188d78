"""Whether a model still works, told after something failed in it."""

from dataclasses import dataclass

import torch

from flexalign.decoding.dials import RowDials
from flexalign.policies import Fixed
from flexalign.serving.engine.frame import Frame
from flexalign.serving.engine.runners import Runner

__all__ = ["require_working"]


def require_working(runner: Runner, token: int) -> None:
    """Run one token, so that no client's input has a part in it.

    A prompt that is too much for the memory fails by itself; after a fault of the device every
    step fails, and a server that goes on answers nobody.

    Args:
        runner: What is tried.
        token: A token id.

    Raises:
        Exception: What the model fails with.
    """
    frame: Frame[_Row] = Frame(runner)
    row = _Row(token)
    ids = torch.tensor([[token]], device=runner.model.device)
    nothing = torch.zeros_like(ids)
    dials = RowDials.of([Fixed(row.lam())], 1)
    frame.add([row], runner.prefill(ids, nothing, [(torch.tensor([0]), dials)]), nothing)
    frame.step()


@dataclass
class _Row:
    next_token: int

    def lam(self) -> float:
        return 0.5
