"""How much of what training changed lies outside the harmfulness-refusal plane (HARC 2607.00572).

    outside = 1 - sum_i ||P d_i||^2 / sum_i ||d_i||^2,      d_i = h_tuned(i) - h_base(i)

P projects onto the span of the base's v_harm and v_ref at a layer; i runs over prompts. A change
that is spread over all dimensions has 1 - 2 / d_model, which is the null.
"""

from __future__ import annotations

from torch import Tensor

from geometry.interventions import basis


def share_outside(change: Tensor, harm: Tensor, refusal: Tensor) -> Tensor:
    """(prompt, layer, d_model) changes and (layer, d_model) directions -> (layer,) shares.

    NaN where nothing changed or where a direction is missing.
    """
    shares = change.new_full((change.shape[1],), float("nan"))
    for layer in range(change.shape[1]):
        d = change[:, layer].double()
        whole = d.square().sum()
        if whole > 0 and harm[layer].norm() > 0 and refusal[layer].norm() > 0:
            inside = (d @ basis("H+R", harm[layer], refusal[layer]).double().T).square().sum()
            shares[layer] = 1 - inside / whole
    return shares


def null_outside(d_model: int) -> float:
    """The share of a change that prefers no dimension."""
    return 1 - 2 / d_model
