"""The language-model head apart from its model: logits of chosen positions and tokens.

What models do to the head's output is an elementwise map: nothing, a constant factor, or
soft-capping c tanh(x / c). Which one is found by comparing with the model's own logits, never by a
family's name.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from core.models import LoadedModel
from core.products import FrozenLinear, linear

KEPT = "_attack_plane_head"
"""Where a model keeps its head once it was found."""


def head_of(loaded: LoadedModel, probe_ids: Tensor) -> Head:
    """The head of a model, looked for once: what is done to its output belongs to the model's code,
    so training does not change it."""
    kept: Head | None = vars(loaded).get(KEPT)
    layer = loaded.model.get_output_embeddings()
    if kept is None or kept.layer is not layer or kept._weight is not layer.weight:
        kept = vars(loaded)[KEPT] = Head(loaded, probe_ids)
    return kept


class Head:
    """``usable`` is False where the map could not be found; ``logits`` must not be used then."""

    def __init__(self, loaded: LoadedModel, probe_ids: Tensor) -> None:
        self.layer = layer = loaded.model.get_output_embeddings()
        self.scale, self.cap = 1.0, None
        self.usable = isinstance(layer, nn.Linear)
        self._weight: Any = getattr(layer, "weight", None)
        self._bias: Any = getattr(layer, "bias", None)
        if self.usable:
            self.usable = self._fit(loaded, probe_ids)

    @torch.no_grad()
    def _fit(self, loaded: LoadedModel, probe_ids: Tensor) -> bool:
        """Take the map that fits the model's own logits best; False where none does."""
        inputs = {"input_ids": probe_ids[None, :8].to(loaded.device), "use_cache": False}
        raw = self.logits(loaded.decoder(**inputs).last_hidden_state[0])
        own = loaded.model(**inputs).logits[0].float()
        factor = float((own * raw).sum() / (raw * raw).sum())
        maps = [
            (1.0, None),
            (factor, None),
            (1.0, getattr(loaded.config, "final_logit_softcapping", None)),
        ]
        errors = []
        for self.scale, self.cap in maps:
            errors.append(float((self._mapped(raw) - own).abs().max()))
        least = min(errors)
        self.scale, self.cap = maps[errors.index(least)]
        return least <= (1e-4 if loaded.dtype == torch.float32 else 3e-2) * float(own.abs().max())

    def _mapped(self, raw: Tensor) -> Tensor:
        if self.cap:
            return (raw / self.cap).tanh() * self.cap
        return raw if self.scale == 1.0 else raw * self.scale

    @property
    def tokens(self) -> int:
        return self._weight.shape[0]

    def restricted(self, tokens: Tensor) -> Head:
        """The same head over these token ids only."""
        part = copy.copy(self)
        if self._weight.is_meta:
            return _Part(self, tokens)
        part._weight = self._weight[tokens]
        part._bias = None if self._bias is None else self._bias[tokens]
        return part

    def logits(self, hidden: Tensor) -> Tensor:
        """(positions, d_model) -> (positions, tokens) float32."""
        # contiguous rows: a strided view of a batch would be multiplied batch by batch, many times
        # slower
        rows, weight = hidden.contiguous(), self._weight
        if weight.is_meta:  # the layer itself fetches it
            return self._mapped(self.layer(rows.to(self.layer.weight.dtype)).float())
        rows = rows.to(weight.device, weight.dtype)
        if isinstance(self.layer, FrozenLinear):
            whole = weight is self.layer.weight
            packed = self.layer.packed if whole else None
            return self._mapped(linear(rows, weight, self._bias, packed).float())
        return self._mapped(nn.functional.linear(rows, weight, self._bias).float())


class _Part(Head):
    """Some tokens of a head whose weights are not at hand: all are computed, some are taken."""

    def __init__(self, whole: Head, tokens: Tensor) -> None:
        self.whole, self.chosen = whole, tokens

    def logits(self, hidden: Tensor) -> Tensor:
        every = self.whole.logits(hidden)
        return every[..., self.chosen.to(every.device)]
