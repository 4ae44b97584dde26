"""Carriers: the directions that a model's refusals depend on [SG 2606.16349].

The mean-difference field holds the difference of two class means at every position and layer. Each
position and layer is a candidate. It is tried on prompts:

    comply   by how much ablating it at all layers lowers the mean log-probability of refusals on
             harmful prompts, nats per token
    refuse   by how much adding it at its own layer, at its own length, raises that log-probability
             on harmless prompts, nats per token
    kl       KL of the next token of harmless prompts under the ablation, nats. A candidate is
             admissible if this is at most 0.1.
    score    refuse + comply - kl

The best carrier is the admissible candidate with the highest score. If none is admissible, the one
with the lowest KL is taken, and the result says so. To save time, candidates are screened on the
first few prompts, and only the best of them are scored on all.

SG scores refusing and complying too, but does not state in which units. We use log-probabilities,
since they move before replies do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from core.models import LoadedModel
from core.prompt import Prompt
from core.rows import Row
from geometry.contrasts import Contrast, unit
from geometry.interventions import ablation, steering
from geometry.layers import DEPTH, MAX_KL, inner_layers
from geometry.rollout import rollout

SCREENED, KEPT = 4, 6
"""Prompts of each label in the screening; candidates that are scored on all prompts."""


@dataclass(frozen=True)
class Carrier:
    """A candidate with its scores.

    ``vector`` (d_model,) is a unit vector, ``norm`` the length that it had.
    """

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

    def to_row(self) -> Row:
        row = asdict(self) | {"admissible": self.admissible, "score": self.score}
        del row["vector"]
        return row


def candidates(field: dict[str, Contrast], n_layers: int, every: int = 1) -> list[Carrier]:
    """The field's vectors at its positions, at every ``every``-th layer up to 80 % of the depth."""
    carriers = []
    for position, contrast in field.items():
        difference, alive = contrast.difference, contrast.alive
        for layer in range(inner_layers(n_layers).start, int(DEPTH * n_layers) + 1, every):
            if alive[layer]:
                vector = unit(difference[layer]).float()
                carriers.append(Carrier(position, layer, vector, float(difference[layer].norm())))
    if not carriers:
        raise AttackPlaneError(
            "no carrier to try: the classes do not differ at any of these positions and layers",
            got=f"positions {', '.join(field)}, every {every} of {n_layers} layers",
        )
    return carriers


def scored(
    loaded: LoadedModel,
    carriers: Sequence[Carrier],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    refusals: Sequence[Sequence[int]],
) -> list[Carrier]:
    """The candidates with their scores on these prompts, best first.

    Admissible ones come first, by score. The others follow by KL.
    """
    everywhere = range(loaded.n_layers + 1)
    ablations = [ablation("carrier", c.vector[None], everywhere) for c in carriers]
    additions = [steering("carrier", c.vector, [c.layer], c.norm) for c in carriers]
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
    n = len(carriers)
    result = [
        replace(
            c,
            comply=float(bad_refusal[0] - bad_refusal[1 + i]),
            refuse=float(good_refusal[1 + n + i] - good_refusal[0]),
            kl=float(kl[1 + i]),
        )
        for i, c in enumerate(carriers)
    ]
    return sorted(result, key=lambda c: (not c.admissible, -c.score if c.admissible else c.kl))


def screened(
    loaded: LoadedModel,
    carriers: Sequence[Carrier],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    refusals: Sequence[Sequence[int]],
) -> list[Carrier]:
    """As ``scored``, but only for the best of a screening on ``SCREENED`` prompts a label."""
    first = scored(loaded, carriers, harmful[:SCREENED], harmless[:SCREENED], refusals[:1])
    return scored(loaded, first[:KEPT], harmful, harmless, refusals)
