"""Which layer? Three criteria from the literature, each by its name, none of them silently.

``eq6``         HARC 2607.00572, Eq. 6: (1 - |cos(v_harm, v_ref)|) (1 - |cos(v_harm_resp,
                v_ref_resp)|) |cos(v_harm, v_harm_resp)| |cos(v_ref, v_ref_resp)|, over layers [4, n
                - 4]; needs response-side directions
``separation``  held-out AUROC of harmful against harmless along v_harm and along v_ref, averaged,
                over the same layers
``arditi``      2406.11717: lowest refusal under ablation, among layers below 80 % of the depth
                whose ablation keeps KL <= 0.1 nats on harmless prompts' next token and whose
                addition raises refusal there
``eq6_prompt``  Eq. 6's first factor times the mean held-out d' (``directions.layer_score``): where
                no replies are at hand

Response side, over means of the first 32 response tokens: v_harm_resp = n(harmful continuation -
benign reply); v_ref_resp in HARC's paper n(refusal - harmful continuation) (``paper``), in its code
n(refusal - helpful reply) (``code``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geometry.contrasts import cosine

MAX_KL, DEPTH = 0.1, 0.8


def inner_layers(n_layers: int) -> range:
    """Layers 4 to n - 4. In models of fewer than 12 layers a sixth is left out at each end."""
    edge = 4 if n_layers >= 12 else n_layers // 6
    return range(max(1, edge), n_layers - edge + 1)


def eq6(harm: Tensor, refusal: Tensor, harm_response: Tensor, refusal_response: Tensor) -> Tensor:
    """HARC's layer score of (layer, d_model) unit directions, (layer,) in [0, 1]."""
    return (
        (1 - cosine(harm, refusal).abs())
        * (1 - cosine(harm_response, refusal_response).abs())
        * cosine(harm, harm_response).abs()
        * cosine(refusal, refusal_response).abs()
    )


def arditi_layers(rows: Sequence[Mapping[str, float]], n_layers: int) -> list[int]:
    """Layers that pass Arditi's filter, the one that takes most refusal away first.

    Rows have layer, kl, refuse and comply of one direction per layer.
    """
    # layers that were tried; under zhao the direction is that of refused against accepted prompts
    passed = [
        r for r in rows if r["kl"] <= MAX_KL and r["refuse"] > 0 and r["layer"] < DEPTH * n_layers
    ]
    return [int(r["layer"]) for r in sorted(passed, key=lambda r: -r["comply"])]


def choose(scores: Mapping[str, Tensor], n_layers: int) -> dict[str, int]:
    """The best inner layer by each (layer,) score."""
    allowed = torch.full((n_layers + 1,), -torch.inf)
    allowed[list(inner_layers(n_layers))] = 0
    return {
        name: int((score.nan_to_num(-torch.inf) + allowed).argmax())
        for name, score in scores.items()
    }
