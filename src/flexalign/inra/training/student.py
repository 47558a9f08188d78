"""The adapter stream as a model to train: the base itself, with the adapter in front of layer 0.

Trainers want one transformers model whose forward is what they train. While an adapter is in
training, its base is that model: every pass goes through the adapter, whose parameters are listed
among the base's and are the only ones with gradients. No second copy of the base is made; the
base stream is the same module with the adapter passed by.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flexalign.inra.model import InRaModel
from flexalign.inra.streams import Entry

__all__ = ["adapter_off", "as_student"]

_NAME = "inra_adapter"


@contextmanager
def as_student(model: InRaModel) -> Iterator[Any]:
    """Give the base as the adapter stream to train, and put it back as it was after.

    The adapter is in float32 inside, whatever the base is in: small steps are lost in bfloat16.

    Args:
        model: Base and adapter; its `save_pretrained` saves the student, which is the adapter.
    """
    base: Any = model.base
    dtype = next(model.adapter.parameters()).dtype
    forward = base.__dict__.get("forward")
    config = base.config.get_text_config(decoder=True)
    use_cache = getattr(config, "use_cache", True)
    model.adapter.float()
    base.add_module(_NAME, model.adapter)
    base.save_pretrained = model.save_pretrained
    config.use_cache = False  # a cache of the base has no room for the adapter
    model.entry.stands_open = True
    try:
        yield base
    finally:
        model.entry.stands_open = False
        config.use_cache = use_cache
        delattr(base, _NAME)
        del base.save_pretrained
        # TRL puts a forward with its own loss in the place of the class's.
        base.__dict__.pop("forward", None)
        if forward is not None:
            base.forward = forward
        model.adapter.to(dtype)
        base.eval()


@contextmanager
def adapter_off(entry: Entry) -> Iterator[None]:
    """Let every row pass the adapter by: inside, a student's module is its base."""
    with entry.open(0, 0):
        yield
