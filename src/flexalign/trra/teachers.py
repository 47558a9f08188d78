"""The two frozen teachers of a run: modules of their own, or adapters on the student's base.

Where the aligned model is a PEFT adapter on the reference and the student a LoRA on the same base,
one module holds all three: the reference is that module with every adapter off, the aligned model
with its adapter on. The switch touches no ``requires_grad``, so an optimizer and a DDP wrapper
see the same parameters throughout.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from flexalign._modes import evaluating
from flexalign.heads import last_hidden
from flexalign.pairing.adapters import AdapterSwitch, inner_model
from flexalign.trra.forward import HeadForm, run_inside
from flexalign.trra.sharding import place_teacher

__all__ = ["Teacher", "as_teacher"]


@dataclass
class Teacher:
    """One side of the pair, ready to give hidden states.

    Attributes:
        model: The module: a transformers model, or a PEFT wrapper of one.
        adapters: The adapters to switch on for this side, all others off; None: as they are.
        form: The form of its head.
        shares_student: True if `model` is the student's own module.
        switch: Entered around every pass: what makes `model` this side where PEFT does not.
    """

    model: nn.Module
    adapters: tuple[str, ...] | None
    form: HeadForm
    shares_student: bool
    switch: Callable[[], AbstractContextManager[None]] = nullcontext
    _wrapped: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self._wrapped = self.model

    def prepare(self, accelerator: Accelerator, *, deepspeed: bool, fsdp: bool) -> None:
        """Place a module of its own as the student is placed: moved, or sharded like it."""
        if self.shares_student:
            return
        self._wrapped = place_teacher(self.model, accelerator, deepspeed=deepspeed, fsdp=fsdp)

    @torch.no_grad()
    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the final hidden states, shape ``(B, T, H)``, without gradient or dropout.

        A teacher that shares the student's module is called within the student's forward.
        """
        inner = inner_model(self.model)
        with as_teacher(self.model, self.adapters), self.switch():
            if self.shares_student:
                return last_hidden(inner, **inputs)
            return run_inside(
                self._wrapped, inner, lambda **given: last_hidden(inner, **given), **inputs
            )


@contextmanager
def as_teacher(model: nn.Module, adapters: tuple[str, ...] | None) -> Iterator[None]:
    """Switch dropout off and the adapters as told; put both back after.

    Args:
        model: A transformers model or a PEFT wrapper.
        adapters: Names to switch on, all others off; None leaves them as they are.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if adapters is not None and isinstance(model, PeftModel):
            stack.enter_context(AdapterSwitch(model).use(adapters))
        yield
