"""A copy of a model whose linear layers round only what differs from the current suffix.

A candidate differs from the current suffix in one token, or a few. Let x0 be what a layer of the
exact model took at one position of the current suffix, and y0 = W x0 + b what it gave. The same
layer of the copy takes x at that position of a candidate. Then

    W x + b = y0 + W (x - x0)

holds exactly, and only the second term is rounded. x - x0 is small behind the changed token, and
the few outlying channels, which x has at every token, are gone from it. So eight bits do, where
those of x itself lose the order of the candidates (docs/lab-log.md has the errors):

- On a CPU, W and x - x0 become 8-bit integers, with a scale for each output and for each token.
  Such products run at about twice the rate of bfloat16 ones.
- Elsewhere both become bfloat16.

Embedding, norms, attention and head are the model's own.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from core.memory import keep_freed
from core.models import LoadedModel
from core.products import LINEAR

LEVELS = 127
"""The largest 8-bit integer that is used: both signs have as many."""
TINY = 1e-20
"""Stands in for a scale of nothing but zeros."""

Known = dict[nn.Module, tuple[Tensor, Tensor]]
"""x0 (token, inputs) and y0 over scale (token, outputs) of the current suffix, by layer of the
copy: about 1 MiB a token of a model with 135 million parameters."""


class _Now:
    """What all layers of a copy need in a pass."""

    def __init__(self) -> None:
        self.known: Known = {}
        self.rows: Callable[[], Tensor]  # (fed tokens,) of the calling thread's batch
        self.last = threading.local()  # what a thread rounded last: several layers take one input


class RoughLinear(nn.Linear):
    """y0 + W (x - x0), the product rounded; exact where x0 and y0 are not known.

    Attributes:
        coarse: (inputs, outputs) the rounded weight.
        scale: (outputs,) what it is to be multiplied by.
    """

    now: _Now
    coarse: Tensor
    scale: Tensor

    def round_to(self, dtype: torch.dtype) -> None:
        weight = self.weight.detach()
        self.scale = weight.new_ones(len(weight))
        if dtype == torch.int8:
            self.scale = weight.abs().amax(1).clamp_min(TINY) / LEVELS
            weight = (weight / self.scale[:, None]).round()
        self.coarse = weight.to(dtype, copy=True).T

    def forward(self, input: Tensor) -> Tensor:
        known = self.now.known.get(self)
        if known is None or input.shape[:-1] != (1, len(rows := self.now.rows())):
            return super().forward(input)
        x0, y0 = known
        last = self.now.last
        if getattr(last, "input", None) is not input:
            last.rounded = self._rounded(input[0] - x0.index_select(0, rows))
            last.input = input
        difference, scale = last.rounded
        multiply = torch._int_mm if self.coarse.dtype == torch.int8 else torch.mm
        product = multiply(difference, self.coarse).to(y0.dtype)
        return y0.index_select(0, rows).addcmul_(product, scale).mul_(self.scale)[None]

    def _rounded(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """(token, inputs), and the (token, 1) scale that it is to be multiplied by."""
        if self.coarse.dtype != torch.int8:
            return difference.to(self.coarse.dtype), difference.new_ones(1, 1)
        most = difference.abs().amax(1, keepdim=True).clamp_min_(TINY)
        return difference.mul_(LEVELS / most).round_().to(torch.int8), most / LEVELS


class RoughModel:
    """The copy of a model. Its weights are the model's own; the rounded ones are added.

    Args:
        dtype: what weights and differences are rounded to; None takes int8 on a CPU, bfloat16
            elsewhere. Another type is a conversion, without scales.

    Attributes:
        loaded: the copy.
        layers: layers of the model, each with its twin.
    """

    def __init__(self, original: LoadedModel, dtype: torch.dtype | None = None) -> None:
        own = {id(p): p for p in original.model.parameters()}
        self.loaded = dataclasses.replace(original, model=copy.deepcopy(original.model, own))
        self._now = _Now()
        self.layers: list[tuple[nn.Module, RoughLinear]] = []
        on_cpu = original.device.type == "cpu"
        if on_cpu:
            keep_freed()
        both = zip(original.decoder.modules(), self.loaded.decoder.modules(), strict=True)
        for layer, twin in both:
            if type(twin) in LINEAR:
                twin.__class__ = RoughLinear
                assert isinstance(twin, RoughLinear)
                twin.now = self._now
                twin.round_to(dtype or (torch.int8 if on_cpu else torch.bfloat16))
                self.layers.append((layer, twin))

    @contextmanager
    def watching(self, tokens: int) -> Iterator[Known]:
        """Keep what the exact model's layers take and give in one pass of so many tokens."""
        known: Known = {}

        def hook_of(twin: RoughLinear) -> Callable[..., None]:
            def keep(_: nn.Module, args: tuple[Tensor, ...], given: Tensor) -> None:
                if len(args) == 1 and args[0].shape[:-1] == (1, tokens):
                    known[twin] = args[0].detach()[0], given.detach()[0] / twin.scale

            return keep

        with ExitStack() as hooks:
            for layer, twin in self.layers:
                # before hooks of the model's own, which the twin has too
                hooks.enter_context(layer.register_forward_hook(hook_of(twin), prepend=True))
            yield known

    @contextmanager
    def comparing(self, known: Known, rows: Callable[[], Tensor]) -> Iterator[None]:
        """Passes through the copy compare with what is known.

        ``rows`` tells a thread which token of ``known`` each of its (fed tokens,) goes with.
        """
        self._now.known, self._now.rows = known, rows
        try:
            yield
        finally:
            self._now.known, self._now.last = {}, threading.local()
