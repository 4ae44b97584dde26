"""Gradients in which residual branches count less: LSGM (arXiv 2405.20778, section 4.1).

A block adds what attention and MLP write to the residual stream. While ``damped`` is open, a
gradient that flows back through one of these branches is multiplied by gamma; what flows along the
stream itself is not. Values stay as they are, to the bit. The authors' code scales the gradient at
the norm in front of each branch, which is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from core.models import LoadedModel
from geometry.edits import writers


@contextmanager
def damped(loaded: LoadedModel, gamma: float) -> Iterator[None]:
    """While open, gradients through residual branches are multiplied by ``gamma``; 1: as usual."""

    def branch(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return scaled(output[0]), *output[1:]
        return scaled(output)

    def scaled(written: Tensor) -> Tensor:
        value = written.detach()
        return value + gamma * (written - value)

    parts = [] if gamma == 1 else [w for b in loaded.blocks for w in writers(b, loaded.spec)]
    handles = [part.register_forward_hook(branch) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
