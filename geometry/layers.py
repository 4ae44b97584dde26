"""Which layer? Criteria from the literature, each by its name, none of them silently.

``eq6_paper``   HARC 2607.00572, Eq. 6: (1 - |cos(v_harm, v_ref)|) (1 - |cos(v_harm_resp,
                v_ref_resp)|) |cos(v_harm, v_harm_resp)| |cos(v_ref, v_ref_resp)|, over layers [4, n
                - 4]. v_ref is harmful - harmless at t_post_inst, as HARC has it
``eq6_code``    the same with the official code's v_ref_resp
``eq6_zhao``    as ``eq6_paper``, with v_ref from refused - accepted prompts: ours, no paper's
``separation``  held-out AUROC of harmful against harmless along v_harm and along v_ref, averaged,
                over the same layers
``arditi``      2406.11717, as its official code chooses (``arditi_choice``)
``eq6_prompt``  Eq. 6's first factor times the mean held-out d' (``directions.layer_score``): where
                no replies are at hand

Response side, over means of the first 32 response tokens: v_harm_resp = n(harmful continuation -
benign reply); v_ref_resp in HARC's paper n(refusal - harmful continuation), in its code n(refusal -
helpful reply).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Candidate:
    """A direction of Arditi's table, with its scores (``select_direction.py``).

    Attributes:
        refusal: log-odds of refusal tokens on harmful prompts with the direction ablated, nats.
        steering: the same on harmless prompts with the direction added at its layer, nats.
        kl: of the next token of harmless prompts under the ablation, nats.
    """

    position: str
    layer: int
    refusal: float
    steering: float
    kl: float


def arditi_choice(table: Sequence[Candidate], n_layers: int) -> list[Candidate]:
    """Candidates that pass Arditi's filter, the one that is chosen first.

    Dropped are those with a score that is no number, a layer of int(0.8 n) or more, a KL above 0.1,
    or a steering score below 0: added to harmless prompts, the direction must make a refusal at
    least as likely as not. Of the rest the lowest refusal score is chosen, the first of equal ones.
    """
    kept = [
        c
        for c in table
        if all(map(math.isfinite, (c.refusal, c.steering, c.kl)))
        and c.layer < int(DEPTH * n_layers)
        and c.kl <= MAX_KL
        and c.steering >= 0
    ]
    return sorted(kept, key=lambda c: c.refusal)


def choose(scores: Mapping[str, Tensor], n_layers: int) -> dict[str, int]:
    """The best inner layer by each (layer,) score."""
    allowed = torch.full((n_layers + 1,), -torch.inf)
    allowed[list(inner_layers(n_layers))] = 0
    return {
        name: int((score.nan_to_num(-torch.inf) + allowed).argmax())
        for name, score in scores.items()
    }
