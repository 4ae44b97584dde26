"""Keys and values of a token prefix that many sequences share.

They are computed once and expanded to any batch without a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from core.models import LoadedModel

# Exactly these: their other subclasses keep more state than keys and values.
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def keeps_keys_and_values_only(loaded: LoadedModel) -> bool:
    """Whether this model keeps nothing of earlier tokens but keys and values.

    Recurrent models keep a state too, and a hook may depend on whole prompts.
    """
    if loaded.hook:
        return False
    layers = DynamicCache(config=loaded.model.config).layers
    return all(type(layer) in PLAIN_LAYERS for layer in layers)


def shares_a_start(loaded: LoadedModel) -> bool:
    """Whether sequences of unequal length may go on, padded, from one common start.

    A sliding window counts the padding between them, so it must be absent.
    """
    layers = DynamicCache(config=loaded.model.config).layers
    return not loaded.hook and all(type(layer) is DynamicLayer for layer in layers)


def shared_length(ids: Sequence[Sequence[int]], first_wanted: int) -> int:
    """How many leading tokens all prompts share, ending before the first wanted position."""
    # whatever the lexicographically first and last share, all between them share too
    first, last = min(map(tuple, ids)), max(map(tuple, ids))
    limit = min(first_wanted, len(first), len(last))
    return next((index for index in range(limit) if first[index] != last[index]), limit)


class SharedPrefix:
    """The key-value cache of ``ids`` (prefix tokens) on one model.

    ``usable`` is False where the model keeps another kind of state (recurrent layers, static
    caches): callers then feed whole sequences, which is slower and equally exact.
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
        plain = self.length > 0 and not loaded.hook
        self.usable = plain and all(
            isinstance(layer, DynamicLayer) and type(layer) in PLAIN_LAYERS and layer.is_initialized
            for layer in self._cache.layers
        )

    def expanded(self, batch: int) -> DynamicCache:
        """A fresh cache for ``batch`` sequences; appending to it leaves the prefix as it was."""
        return _copied(self._cache, lambda states: states.expand(batch, -1, -1, -1))


def forked(cache: Any, rows: torch.Tensor | None = None) -> DynamicCache:
    """A cache that goes on from ``cache``, which stays as it is.

    ``rows`` are indices of its sequences, in the order that is wanted.
    """
    return _copied(
        cache, (lambda states: states) if rows is None else (lambda states: states[rows])
    )


def _copied(cache: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> DynamicCache:
    # appending makes new tensors, so sharing the old ones is safe
    fresh = copy.copy(cache)
    fresh.layers = []
    for layer in cache.layers:
        own = copy.copy(layer)
        if own.is_initialized:
            own.keys, own.values = change(layer.keys), change(layer.values)
        fresh.layers.append(own)
    return fresh
