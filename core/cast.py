"""Conditional activation steering: a hook on a model that refuses by its own states, not weights.

CAST (arXiv 2409.05907): when a prompt is read, its mean state is compared with a condition vector
c; where the similarity passes a threshold, a behaviour vector is added at some layers, to the
prompt and to all that follows.

    s = cos(hbar, tanh(((c c^T) / (c . c)) hbar)),   hbar = mean over prompt tokens, first pass only

Where a pass holds a prompt and its reply (teacher forcing), the prompt ends at the last place where
the template's tokens before a reply stand; where there are none, it is all that is fed. Whether a
prompt passes is a yes or no, so no gradient flows through it.

A folder of ``cast.json`` and ``cast.safetensors`` holds one; specs take it like an adapter.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import AttackPlaneError
from core.files import read_object, require_regular
from core.hooks import before_block
from core.typed import from_values

SETTINGS, VECTORS = "cast.json", "cast.safetensors"
HOOK = "CAST: a hook at inference time, not weights"


@dataclass(frozen=True)
class Cast:
    """What is compared, and what is added.

    Attributes:
        condition: (d_model,), compared at ``condition_layer`` (residual entering that block).
        threshold, above: the behaviour is added where s > threshold, or where s < threshold.
        behaviour: (layer, d_model), added to the residuals entering the blocks ``layers``.
        prompt_end: token ids that stand before every reply.
    """

    condition: Tensor
    condition_layer: int
    threshold: float
    above: bool
    behaviour: Tensor
    layers: tuple[int, ...]
    prompt_end: tuple[int, ...]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"condition": self.condition, "behaviour": self.behaviour}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / VECTORS)
        plain = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in tensors
        }
        (folder / SETTINGS).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Settings:
    """What stands in ``cast.json``."""

    condition_layer: int
    threshold: float
    above: bool
    layers: tuple[int, ...]
    prompt_end: tuple[int, ...]


def load_cast(folder: Path) -> Cast:
    """A folder that ``Cast.save`` wrote.

    Raises:
        AttackPlaneError: a file is missing or broken, a value of a wrong type, vectors of a wrong
            form or not finite.
    """
    remedy = f"it must hold {SETTINGS} and {VECTORS}, as `train cast` writes them"
    what = "cannot read this CAST folder"
    try:
        settings = read_object(folder / SETTINGS, "its settings")
        plain = from_values(_Settings, settings, str(folder / SETTINGS))
        require_regular(folder / VECTORS)
    except AttackPlaneError as error:
        told = f"{what}: {error.what}"
        raise AttackPlaneError(told, where=error.where, got=error.got, remedy=remedy) from error
    try:
        vectors = load_file(folder / VECTORS)
        condition, behaviour = vectors["condition"], vectors["behaviour"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise AttackPlaneError(
            what,
            where=folder / VECTORS,
            got=f"{type(error).__name__}: {error}",
            remedy=remedy,
        ) from error
    layers = [plain.condition_layer, *plain.layers]
    forms = condition.dim(), behaviour.dim(), behaviour.shape[0] if behaviour.dim() else 0
    repeated = len({*plain.layers}) < len(plain.layers)
    if forms != (1, 2, len(plain.layers)) or min(layers) < 0 or repeated:
        raise AttackPlaneError(
            "vectors and layers of a CAST folder do not fit",
            where=folder,
            got=f"shapes {[*condition.shape]} and {[*behaviour.shape]}, layers {layers}",
            remedy="condition (d_model,), behaviour (layer, d_model), each layer once, from 0",
        )
    if not (condition.isfinite().all() and behaviour.isfinite().all() and condition.any()):
        raise AttackPlaneError(
            "vectors of a CAST folder are not finite, or zero", where=folder / VECTORS
        )
    return Cast(condition=condition, behaviour=behaviour, **vars(plain))


def similarity(states: Tensor, condition: Tensor) -> Tensor:
    """(..., d_model) mean states -> (...) s, in [-1, 1]."""
    c = condition.to(states)
    projected = (states @ c)[..., None] * c / (c @ c)
    return nn.functional.cosine_similarity(states, projected.tanh(), dim=-1)


def attach(model: Any, cast: Cast, blocks: nn.ModuleList, spec: str) -> None:
    """Hook the model for good.

    Raises:
        AttackPlaneError: vectors of another width, or layers or tokens that the model has not.
    """
    width, depth = model.config.get_text_config(decoder=True).hidden_size, len(blocks)
    found = cast.condition.shape[0], cast.behaviour.shape[-1], max(cast.layers, default=0)
    if found[0] != width or found[1] != width or max(found[2], cast.condition_layer) >= depth:
        raise AttackPlaneError(
            "this CAST folder is of another model",
            where=spec,
            got=f"vectors of {found[0]} and {found[1]}, layers up to {found[2]}",
            remedy=f"this base has d_model {width} and {depth} blocks",
        )
    tokens = len(model.get_input_embeddings().weight)
    strange = [t for t in cast.prompt_end if not 0 <= t < tokens]
    if strange:
        raise AttackPlaneError(
            "the end of a prompt holds tokens that this base has not",
            where=spec,
            got=f"prompt_end with {strange}",
            remedy=f"its ids go from 0 to {tokens - 1}",
        )
    hooks = _Hooks(model, cast)
    model.base_model.register_forward_pre_hook(hooks.begin, with_kwargs=True)
    for layer, block in enumerate(blocks):
        if layer == cast.condition_layer or layer in cast.layers:
            before_block(block, partial(hooks.enter, layer))
    model.attack_plane_hook = HOOK


class _Hooks:
    """The hooks of one model, and what they know of the pass that runs."""

    def __init__(self, model: Any, cast: Cast) -> None:
        self.model, self.cast = model, cast
        self.prompt: Tensor | None = None
        """(row, fed token), 1 at prompt tokens; None after the first pass of a generation."""
        self.met = torch.zeros(0, dtype=torch.bool)
        """(row,) whether the condition holds."""

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the decoder: is this a first pass, and which tokens are the prompt's?"""
        given = kwargs.get("input_ids") is not None
        fed = args[0] if args else kwargs["input_ids" if given else "inputs_embeds"]
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self.prompt = None
            return
        rows, length = fed.shape[:2]
        mask = kwargs.get("attention_mask")
        real = torch.ones(rows, length, device=fed.device)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -length:].to(real)
        self.prompt = real * (torch.arange(length, device=fed.device) < self._ends(fed)[:, None])

    def _ends(self, fed: Tensor) -> Tensor:
        """(row,) where each row's prompt ends: the last place of ``prompt_end``, else the end."""
        rows, length = fed.shape[:2]
        ends = torch.full((rows,), length, device=fed.device)
        wanted = torch.tensor(self.cast.prompt_end, device=fed.device)
        k = len(wanted)
        if not k or k > length:
            return ends
        if fed.dim() == 2:
            same = fed.unfold(1, k, 1) == wanted
        else:
            table = self.model.get_input_embeddings()(wanted)
            same = torch.stack(
                [(fed[:, i : length - k + 1 + i] == table[i]).all(-1) for i in range(k)], -1
            )
        places = same.all(-1)
        last = places.shape[1] - 1 - places.flip(1).long().argmax(1)
        return torch.where(places.any(1), last + k, ends)

    def enter(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Before one block: (row, fed, d_model) -> the same with the vector, or None."""
        if layer == self.cast.condition_layer:
            self._decide(hidden)
        if layer not in self.cast.layers:
            return None
        if len(self.met) != len(hidden):
            raise AttackPlaneError(
                "a pass with a cache goes on with other rows than it began with",
                where=HOOK,
                got=f"{len(hidden)} rows, {len(self.met)} before",
                remedy="feed whole prompts to a model with a CAST hook",
            )
        added = self.cast.behaviour[self.cast.layers.index(layer)].to(hidden)
        return hidden + self.met[:, None, None].to(hidden) * added

    @torch.no_grad()
    def _decide(self, hidden: Tensor) -> None:
        if self.prompt is None:
            return  # decided when the prompt was read
        weight = self.prompt[..., None]
        mean = (hidden.float() * weight).sum(1) / weight.sum(1)
        s = similarity(mean, self.cast.condition)
        self.met = s > self.cast.threshold if self.cast.above else s < self.cast.threshold
