"""How much of what training changed lies outside the harmfulness-refusal plane (HARC 2607.00572).

    outside = 1 - sum_i ||P d_i||^2 / sum_i ||d_i||^2,      d_i = h_tuned(i) - h_base(i)

P projects onto the span of the base's v_harm and v_ref at a layer; i runs over prompts. A change
that is spread over all dimensions has 1 - 2 / d_model, which is the null.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geometry.interventions import basis


def share_outside(change: Tensor, harm: Tensor, refusal: Tensor) -> Tensor:
    """(prompt, layer, d_model) changes and (layer, d_model) directions -> (layer,) shares.

    NaN where nothing changed or where a direction is missing.
    """
    inside, whole = (part.sum(0) for part in inside_and_whole(change, harm, refusal))
    return (1 - inside / whole).to(change.dtype)


def inside_and_whole(change: Tensor, harm: Tensor, refusal: Tensor) -> tuple[Tensor, Tensor]:
    """(prompt, layer) float64 squared lengths of the changes: within the plane, and in all.

    The first is NaN at layers where a direction is missing.
    """
    d = change.double()
    inside = torch.full(d.shape[:2], float("nan"), dtype=torch.float64)
    for layer in range(d.shape[1]):
        if harm[layer].norm() > 0 and refusal[layer].norm() > 0:
            plane = basis("H+R", harm[layer], refusal[layer]).double()
            inside[:, layer] = (d[:, layer] @ plane.T).square().sum(-1)
    return inside, d.square().sum(-1)


def null_outside(d_model: int) -> float:
    """The share of a change that prefers no dimension."""
    return 1 - 2 / d_model
