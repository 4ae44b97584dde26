"""Models that stay loaded between the stages of one command, as far as memory allows."""

from __future__ import annotations

import os
from collections.abc import Callable
from weakref import WeakValueDictionary

import torch

from core.fingerprint import identity
from core.models import LoadedModel, ModelHandle, load
from core.specs import ModelSpec

SHARE, MOST_ON_CPU = 8, 3 << 30
"""One part in so many of the device's memory may be held; on a CPU at most so many bytes."""
Key = tuple[str, str | None]
"""(spec, fingerprint): of files that have changed the model is loaded anew."""


class Shelf:
    """Opens models for the stages of a command, and holds what it loaded for the next stage.

    What is held takes at most ``most`` bytes together; the model that was asked for longest ago
    goes first, and one that is larger alone is not held. A model that a stage still uses is not
    loaded a second time, held or not.

    Args:
        on_load: told of each model that is loaded.
        most: bytes of weights to hold; None: a share of the memory of the model's device.
    """

    def __init__(
        self, on_load: Callable[[LoadedModel], None] | None = None, most: int | None = None
    ) -> None:
        self._on_load, self._most = on_load, most
        self._held: dict[Key, LoadedModel] = {}  # asked for longest ago first
        self._alive: WeakValueDictionary[Key, LoadedModel] = WeakValueDictionary()

    def __call__(self, spec: str) -> ModelHandle:
        return ModelHandle(spec, load_by=self._load)

    def _load(self, spec: ModelSpec) -> LoadedModel:
        model = self._alive.get((spec.text, identity(spec)))
        if model is None:
            model = load(spec)
            self._alive[spec.text, model.fingerprint] = model
            if self._on_load:
                self._on_load(model)
        self._hold(model)
        return model

    def _hold(self, model: LoadedModel) -> None:
        most = room(model.device) if self._most is None else self._most
        if _bytes(model) > most:
            return
        key = (model.spec, model.fingerprint)
        self._held.pop(key, None)
        self._held[key] = model
        while sum(map(_bytes, self._held.values())) > most:
            del self._held[next(iter(self._held))]


def _bytes(model: LoadedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.model.parameters())


def room(device: torch.device) -> int:
    """Bytes of weights that may be held on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // SHARE
    if not hasattr(os, "sysconf"):  # Windows does not tell
        return MOST_ON_CPU
    return min(MOST_ON_CPU, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // SHARE)
