"""Carriers: directions of the mean-difference field that a model's refusals hang on [SG
2606.16349].

The field holds the difference of class means at every position and layer. A candidate (position,
layer) is tried on prompts:

    comply   how much ablating it, at all layers, lowers the mean log-probability of refusals on
             harmful prompts, nats per token
    refuse   how much adding it at its own layer, at its own length, raises that on harmless
             prompts, nats per token
    kl       KL of harmless prompts' next token under the ablation, nats; admissible: at most 0.1
    score    refuse + comply - kl; the best carrier is the admissible candidate with the highest
             score

To save time candidates are screened on the first few prompts, and the best of those scored on all.
Where none is admissible, the one with the lowest kl comes first, and says so.

SG scores refusing and complying; which units it uses is not stated, log-probabilities are ours:
they move before replies do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from core.models import LoadedModel
from core.prompt import Prompt
from geometry.contrasts import Contrast, unit
from geometry.interventions import ablation, steering
from geometry.layers import DEPTH, MAX_KL, inner_layers
from geometry.rollout import rollout

SCREENED, KEPT = 4, 6
"""Prompts of each label in the screening; candidates that are scored on all prompts."""


@dataclass(frozen=True)
class Carrier:
    """A candidate with its scores; ``vector`` (d_model,) is a unit vector, ``norm`` its length
    before."""

    position: str
    layer: int
    vector: Tensor
    norm: float
    comply: float = float("nan")
    refuse: float = float("nan")
    kl: float = float("nan")

    @property
    def admissible(self) -> bool:
        return self.kl <= MAX_KL

    @property
    def score(self) -> float:
        return self.refuse + self.comply - self.kl

    def to_row(self) -> dict[str, Any]:
        row = asdict(self) | {"admissible": self.admissible, "score": self.score}
        del row["vector"]
        return row


def candidates(field: dict[str, Contrast], n_layers: int, every: int = 1) -> list[Carrier]:
    """Carriers at the field's positions, at every ``every``-th layer from the first inner one to 80
    % of the depth."""
    found = []
    for position, contrast in field.items():
        difference, alive = contrast.difference, contrast.alive
        for layer in range(inner_layers(n_layers).start, int(DEPTH * n_layers) + 1, every):
            if alive[layer]:
                vector = unit(difference[layer]).float()
                found.append(Carrier(position, layer, vector, float(difference[layer].norm())))
    if not found:
        raise AttackPlaneError(
            "no carrier to try: the classes do not differ at any of these positions and layers",
            got=f"positions {', '.join(field)}, every {every} of {n_layers} layers",
        )
    return found


def scored(
    loaded: LoadedModel,
    found: Sequence[Carrier],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    refusals: Sequence[Sequence[int]],
) -> list[Carrier]:
    """The candidates with their scores on these prompts, the best first: admissible ones by score,
    then the rest by KL."""
    everywhere = range(loaded.n_layers + 1)
    ablations = [ablation("carrier", c.vector[None], everywhere) for c in found]
    additions = [steering("carrier", c.vector, [c.layer], c.norm) for c in found]
    bad = rollout(
        loaded, harmful, [None, *ablations], refusals=refusals, description="carriers, harmful"
    )
    good = rollout(
        loaded,
        harmless,
        [None, *ablations, *additions],
        refusals=refusals,
        description="carriers, harmless",
    )
    bad_refusal = torch.tensor([[o.refusal for o in row] for row in bad]).mean(0)
    good_refusal = torch.tensor([[o.refusal for o in row] for row in good]).mean(0)
    kl = torch.tensor([[o.kl for o in row] for row in good]).mean(0)
    n = len(found)
    result = [
        replace(
            c,
            comply=float(bad_refusal[0] - bad_refusal[1 + i]),
            refuse=float(good_refusal[1 + n + i] - good_refusal[0]),
            kl=float(kl[1 + i]),
        )
        for i, c in enumerate(found)
    ]
    return sorted(result, key=lambda c: (not c.admissible, -c.score if c.admissible else c.kl))


def screened(
    loaded: LoadedModel,
    found: Sequence[Carrier],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    refusals: Sequence[Sequence[int]],
) -> list[Carrier]:
    """As ``scored``, for the best after a screening on the first ``SCREENED`` prompts of each
    label."""
    first = scored(loaded, found, harmful[:SCREENED], harmless[:SCREENED], refusals[:1])
    return scored(loaded, first[:KEPT], harmful, harmless, refusals)
