"""Models that stay loaded between the stages of one command, as far as memory allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from core.models import LoadedModel, ModelHandle
from core.weights import default_device

CPU_BYTES = 3 << 30
"""What may stay loaded on a CPU; on CUDA it is an eighth of the device's memory."""


class Shelf:
    """Opens models, each once, and keeps what it loaded for whoever asks for it again.

    What is kept takes at most ``most`` bytes together. The model that was opened longest ago goes
    first, and before the next is loaded, which is taken to be as large as the largest kept one. One
    model alone may be larger. A caller that still uses a model that went holds it itself.

    Args:
        on_load: told of each model that is loaded.
        most: bytes of weights to keep.
    """

    def __init__(
        self, on_load: Callable[[LoadedModel], None] | None = None, most: int | None = None
    ) -> None:
        self._on_load = on_load
        self._most = room() if most is None else most
        self._handles: dict[str, _Kept] = {}

    def __call__(self, spec: str) -> ModelHandle:
        handle = self._handles.pop(spec, None) or _Kept(self, spec, self._on_load)
        self._handles[spec] = handle  # the last one now
        return handle

    def make_room(self, newcomer: _Kept) -> None:
        """Let models go until one more fits."""
        kept = {h: h.bytes for h in self._handles.values() if h is not newcomer and h.bytes}
        expected = max(kept.values(), default=0)
        for handle, size in list(kept.items()):
            if sum(kept.values()) + expected <= self._most:
                break
            kept[handle] -= size
            handle.drop()


class _Kept(ModelHandle):
    """A handle whose weights go when its shelf needs the room, not when a stage is done."""

    def __init__(
        self, shelf: Shelf, spec: str, on_load: Callable[[LoadedModel], None] | None
    ) -> None:
        super().__init__(spec, on_load)
        self._shelf = shelf

    @cached_property
    def loaded(self) -> LoadedModel:
        self._shelf.make_room(self)
        return self._load()

    @property
    def bytes(self) -> int:
        """What its weights take now."""
        if "loaded" not in vars(self):
            return 0
        return sum(p.numel() * p.element_size() for p in self.loaded.model.parameters())

    def release(self) -> None:
        """Nothing: it may be asked for again."""

    def drop(self) -> None:
        super().release()


def room() -> int:
    """Bytes of weights that may stay loaded here."""
    device = default_device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 8
    return CPU_BYTES
