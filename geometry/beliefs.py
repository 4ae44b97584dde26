"""Beliefs [Zhao 2507.11878]: on which side of a contrast does a residual lie, over inner layers?

    belief = mean over layers of cos(h, mu_a) - cos(h, mu_b)        above 0 means a

mu_a and mu_b are the centroids of the contrast's positive and negative side.
"""

from __future__ import annotations

from torch import Tensor

from geometry.contrasts import Contrast, unit
from geometry.layers import inner_layers


def beliefs(contrast: Contrast, resid: Tensor) -> Tensor:
    """(prompt, layer, d_model) -> (prompt,) belief in the positive side of the contrast."""
    layers = list(inner_layers(resid.shape[1] - 1))
    h = unit(resid[:, layers].double())
    first, second = (
        (h * unit(contrast.resid[side][:, layers].double().mean(0))).sum(-1)
        for side in (contrast.positive, contrast.negative)
    )
    return (first - second).mean(1)


def told_rightly(positive: Tensor, negative: Tensor) -> Tensor:
    """(pair,) beliefs of both sides -> (pair,) share of the two that are told rightly, less 1/2."""
    return ((positive > 0).double() + (negative <= 0).double()) / 2 - 0.5


def in_order(positive: Tensor, negative: Tensor) -> Tensor:
    """(pair,) beliefs of both sides -> (pair,) 1/2 where the first is higher, -1/2 where lower."""
    return (positive - negative).sign() / 2
