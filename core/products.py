"""Products of frozen linear layers on a CPU, by the faster of the two libraries that torch holds.

torch computes float32 products by MKL, whose kernels are made for Intel's processors. oneDNN, which
it uses for other types, was faster on an AMD one: by a tenth for many tokens, by a third for forty
(docs/lab-log.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.batching import memory_budget
from core.measured import is_faster, seconds_of

GAIN = 0.95
"""oneDNN is taken where it needs at most this share of MKL's time."""
SMALLEST = 2**16
"""Entries of a weight from which on it may be: a call of oneDNN takes 0.01 ms more."""


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input @ weight.T + bias by oneDNN; it has no gradient of its own."""
    given: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return given


class _Product(torch.autograd.Function):
    """``_product`` with the gradient in its input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(gradient, weight.T), None, None


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None
) -> Tensor:
    """As torch's own; by oneDNN where all is float32 on a CPU and no weight needs a gradient.

    ``packed``: the weight once more, in oneDNN's own layout.
    """
    plain = (
        input.dtype != torch.float32
        or weight.dtype != torch.float32
        or input.device.type != "cpu"
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or torch.is_autocast_enabled("cpu")
    )
    if plain:
        return nn.functional.linear(input, weight, bias)
    if torch.is_grad_enabled() and input.requires_grad:
        given: Tensor = _Product.apply(input, weight, bias)
        return given
    return _product(input, weight if packed is None else packed, bias)


class FrozenLinear(nn.Linear):
    """A linear layer of a frozen model, whose float32 products run on oneDNN."""

    packed: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.packed)


LINEAR = (nn.Linear, FrozenLinear)
"""Types of layers that are a product and nothing else."""


def use_faster_products(model: nn.Module) -> None:
    """Let the linear layers of a frozen float32 model on a CPU use oneDNN, where it is faster."""
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.numel() >= SMALLEST
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    ]
    if layers and _onednn_is_faster():
        for layer in layers:
            layer.__class__ = FrozenLinear


def uses_onednn(model: nn.Module) -> bool:
    """Whether float32 products of some of its layers run on oneDNN."""
    return any(isinstance(module, FrozenLinear) for module in model.modules())


@contextmanager
def packed(model: nn.Module, tokens: int) -> Iterator[None]:
    """While open, the weights are there once more, in the layout that oneDNN multiplies by.

    Otherwise it brings each into that layout for each product, which pays where ``tokens`` go
    through the model at once many times. No weight may change meanwhile. Where they would take more
    than the memory's budget, nothing is done.
    """
    layers = [m for m in model.modules() if isinstance(m, FrozenLinear) and m.packed is None]
    if sum(layer.weight.nbytes for layer in layers) > memory_budget(torch.device("cpu")):
        layers = []
    try:
        for layer in layers:
            weight = layer.weight.detach()
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and getattr(torch.backends.mkldnn, "enabled", True)


def has_integer_products() -> bool:
    """Whether this CPU multiplies 8-bit integers exactly and fast."""
    return _has_onednn() and torch.cpu._is_vnni_supported()


@functools.cache
def _onednn_is_faster() -> bool:
    if not _has_onednn():
        return False
    try:
        return is_faster("products", ["float32"], _seconds, GAIN)
    except (AttributeError, NotImplementedError, RuntimeError):  # a torch without this operation
        return False


@torch.no_grad()
def _seconds() -> tuple[float, float]:
    """Of oneDNN and of MKL, for the shapes of a small model and 256 tokens."""
    input, weight = torch.randn(256, 768), torch.randn(2048, 768)
    return (
        seconds_of(lambda: _product(input, weight, None), 20),
        seconds_of(lambda: nn.functional.linear(input, weight), 20),
    )
