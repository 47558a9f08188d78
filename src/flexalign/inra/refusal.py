"""How a model that fails under the probes is refused: by name, and before any work."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flexalign.errors import FlexAlignError, UnsupportedModelError

__all__ = ["refusing"]


@contextmanager
def refusing(name: str, problem: str) -> Iterator[None]:
    """Turn a failure inside into a refusal of the model; a lack of memory stays one.

    Raises:
        UnsupportedModelError: If what runs inside fails.
    """
    try:
        yield
    except (FlexAlignError, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{name}: {problem} ({reason}); InRa cannot serve this model."
        ) from error
