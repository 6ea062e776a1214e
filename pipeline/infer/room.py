"""Keys and values of earlier positions with room for those that follow, so that a token's are written and not all are moved."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

SPARE, LEAST = 8, 16
"""Room is for an eighth more positions, and for so many at least: a row of thousands is moved some dozen times."""


def make_room(kept: Any) -> None:
    """Let the layers of what `body` returned that hold all keys and values take new ones in place.

    `transformers` puts old and new together anew for each token: two more readings of them all, and memory for both. Layers of
    another kind, with a sliding window or a recurrent state, and those without keys of their own do as before.
    """
    kept.layers[:] = [
        RoomyLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer for layer in kept.layers
    ]


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values are the beginnings of larger tensors, (rows, heads, positions with room, d)."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(vars(layer))
        self._rooms: tuple[torch.Tensor, ...] = ()
        self._shown: tuple[Any, ...] = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """As `DynamicLayer.update`; returns views."""
        length, new = self.get_seq_length(), key_states.shape[2]
        if not self._has_room(length + new):
            spare = max(LEAST, length // SPARE)
            self._rooms = tuple(
                states.new_empty(*states.shape[:2], length + new + spare, states.shape[3])
                for states in (key_states, value_states)
            )
            for room, seen in zip(self._rooms, (self.keys, self.values), strict=True):
                room[:, :, :length] = seen
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, length : length + new] = states
        return self._show(length + new)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As `DynamicLayer.batch_select_indices`, of the room too."""
        if self._has_room(length := self.get_seq_length()):
            self._rooms = tuple(room.index_select(0, indices) for room in self._rooms)
            self._show(length)
        else:
            super().batch_select_indices(indices)

    def _has_room(self, length: int) -> bool:
        """For so many positions. Whoever replaced keys and values meanwhile left the room behind."""
        ours = self._shown and self.keys is self._shown[0] and self.values is self._shown[1]
        return bool(ours) and self._rooms[0].shape[2] >= length

    def _show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = self._shown = tuple(room[:, :, :length] for room in self._rooms)
        return self.keys, self.values
