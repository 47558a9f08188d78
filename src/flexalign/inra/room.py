"""A cache layer with room for the tokens to come.

Transformers' dynamic layer concatenates: each token copies all keys and values before it into new
memory. With two streams that is twice as much, and the largest cost of long prompts beside the
weights. Here a token is written behind those before it, and the whole is copied once in every
128 tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

__all__ = ["RoomyLayer"]

_ROOM = 128
"""Tokens reserved: few beside a long prompt, and a copy costs 1/128 of the attention between."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A dynamic layer whose keys and values are the beginning of larger tensors.

    With gradients on it concatenates like any other, as what is saved for the backward pass must
    not be written to.
    """

    keys: Tensor
    values: Tensor
    _rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, ``(N, heads, T, dim)``, and return all so far."""
        if torch.is_grad_enabled():
            joined: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return joined
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_room, self.keys = _append(self._rooms[0], self.keys, key_states)
        value_room, self.values = _append(self._rooms[1], self.values, value_states)
        self._rooms = key_room, value_room
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, and no room of the old ones."""
        super().batch_select_indices(indices)
        self._rooms = (None, None)

    def reset(self) -> None:
        """Forget everything, the room included."""
        super().reset()
        self._rooms = (None, None)


def _append(room: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Write ``new`` behind ``held``; return the room and what is filled of it."""
    past = held.shape[-2] if held.numel() else 0
    filled = past + new.shape[-2]
    if room is None or not _holds(room, held, filled):
        room = new.new_empty((*new.shape[:-2], filled + _ROOM, new.shape[-1]))
        if past:
            room[..., :past, :] = held
    room[..., past:filled, :] = new
    return room, room[..., :filled, :]


def _holds(room: Tensor, held: Tensor, filled: int) -> bool:
    """Whether ``held`` is the beginning of this room, which may be written to and is large enough.

    Rows selected, cropped or moved to another device in the meantime are seen by their address.
    """
    return (
        held.data_ptr() == room.data_ptr()
        and held.stride() == room.stride()
        and held.shape[:-2] == room.shape[:-2]
        and filled <= room.shape[-2]
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )
