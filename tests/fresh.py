"""The shapes of what a computation makes anew, which is what it costs in memory."""

import math
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Fresh(TorchDispatchMode):
    """Collects the shapes of the tensors that are made under it: neither views nor in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def storages(tree: Any) -> dict[int, Tensor]:
            tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
            return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}

        result = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        self.shapes += [tuple(t.shape) for at, t in storages(result).items() if at not in given]
        return result

    def of_width(self, width: int) -> list[tuple[int, ...]]:
        return [s for s in self.shapes if s[-1:] == (width,) and math.prod(s) > width]
