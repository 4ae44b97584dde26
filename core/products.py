"""Products of frozen linear layers on a CPU, by the faster of the two libraries that torch holds.

torch computes float32 products by MKL, whose kernels are made for Intel's processors. oneDNN, which
it uses for other types, was faster on an AMD one: by a tenth for many tokens, by a third for forty
(docs/lab-log.md).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

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


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch's own; by oneDNN where all is float32 on a CPU and no weight needs a gradient."""
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
    return _product(input, weight, bias)


class FrozenLinear(nn.Linear):
    """A linear layer of a frozen model, whose float32 products run on oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


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
