"""Keys and values of a token prefix that many sequences share: computed once, expanded to any batch without a copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from core.models import LoadedModel

# Exactly these: their other subclasses keep more state than keys and values.
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def keeps_keys_and_values_only(loaded: LoadedModel) -> bool:
    """Whether keys and values are all that this model keeps of earlier tokens (no recurrent or convolution state)."""
    layers = DynamicCache(config=loaded.model.config).layers
    return all(type(layer) in PLAIN_LAYERS for layer in layers)


class SharedPrefix:
    """The key-value cache of ``ids`` (prefix tokens) on one model.

    ``usable`` is False where the model keeps another kind of state (recurrent layers, static caches): callers then
    feed whole sequences, which is slower and equally exact.
    """

    def __init__(self, loaded: LoadedModel, ids: torch.Tensor) -> None:
        self.length = int(ids.numel())
        self._cache: Any = DynamicCache(config=loaded.model.config)
        if self.length:
            with torch.no_grad():
                loaded.decoder(
                    input_ids=ids[None].to(loaded.device),
                    past_key_values=self._cache,
                    use_cache=True,
                )
        self.usable = self.length > 0 and all(
            isinstance(layer, DynamicLayer) and type(layer) in PLAIN_LAYERS and layer.is_initialized
            for layer in self._cache.layers
        )

    def expanded(self, batch: int) -> DynamicCache:
        """A fresh cache for ``batch`` sequences; appending to it leaves the prefix as it was."""
        fresh = copy.copy(self._cache)
        fresh.layers = []
        for layer in self._cache.layers:
            own = copy.copy(layer)
            own.keys = layer.keys.expand(batch, -1, -1, -1)
            own.values = layer.values.expand(batch, -1, -1, -1)
            fresh.layers.append(own)
        return fresh
