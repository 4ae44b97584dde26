"""Carriers: the directions that a model's refusals depend on [SG 2606.16349].

The mean-difference field holds the difference of two class means at every position and layer. Each
position and layer is a candidate. It is tried on contrast prompts:

    comply   by how much ablating it at all layers lowers the mean log-probability of refusals on
             harmful prompts, nats per token
    refuse   by how much adding it at its own layer, at its own length, raises that log-probability
             on harmless prompts, nats per token
    kl       KL of the next token of harmless prompts under the ablation, nats. A candidate is
             admissible if this is at most 0.1.
    score    refuse + comply - kl

1. All candidates are scored to first order, without the KL (``attribution.py``).
2. The best few are scored in full.
3. The carrier is the admissible one with the highest score. If none is admissible, it is the one
   with the lowest KL, and the result says so.

SG scores refusing and complying too, but does not state in which units. We use log-probabilities,
since they move before replies do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from core.models import LoadedModel
from core.prompt import Prompt
from core.rows import Row
from geometry.attribution import Attribution, attribution
from geometry.contrasts import Contrast, unit
from geometry.interventions import ablation, steering
from geometry.layers import DEPTH, MAX_KL, inner_layers
from geometry.rollout import rollout

KEPT = 3
"""Candidates that are scored in full."""


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


class Tried(NamedTuple):
    """What candidates are tried on: prompts, the refusals, and their attributions."""

    harmful: Sequence[Prompt]
    harmless: Sequence[Prompt]
    refusals: Sequence[Sequence[int]]
    at_harmful: Attribution
    at_harmless: Attribution

    @classmethod
    def on(
        cls,
        loaded: LoadedModel,
        harmful: Sequence[Prompt],
        harmless: Sequence[Prompt],
        refusals: Sequence[Sequence[int]],
    ) -> Tried:
        """With the attributions, one backward pass per prompt and refusal."""
        both = (attribution(loaded, prompts, refusals) for prompts in (harmful, harmless))
        return cls(harmful, harmless, refusals, next(both), next(both))


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
    """The candidates with their scores on these prompts, in their order."""
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
    return [
        replace(
            c,
            comply=float(bad_refusal[0] - bad_refusal[1 + i]),
            refuse=float(good_refusal[1 + n + i] - good_refusal[0]),
            kl=float(kl[1 + i]),
        )
        for i, c in enumerate(carriers)
    ]


def by_score(carrier: Carrier) -> tuple[bool, float]:
    """Sorts the best first: admissible ones by score, then the others by KL."""
    return not carrier.admissible, -carrier.score if carrier.admissible else carrier.kl


def first_order(carriers: Sequence[Carrier], tried: Tried) -> Tensor:
    """(n,) ``refuse + comply`` of every candidate to first order."""
    vectors = torch.stack([c.vector for c in carriers])
    lengths = torch.tensor([c.norm for c in carriers])
    added = tried.at_harmless.added(vectors, [c.layer for c in carriers], lengths)
    return added - tried.at_harmful.ablated(vectors)


def screened(loaded: LoadedModel, carriers: Sequence[Carrier], tried: Tried) -> list[Carrier]:
    """The ``KEPT`` best to first order, scored in full, best first."""
    kept = [carriers[i] for i in _best(carriers, tried)]
    return sorted(scored(loaded, kept, *tried[:3]), key=by_score)


def best_of_each(
    loaded: LoadedModel, groups: Sequence[Sequence[Carrier]], tried: Tried
) -> list[tuple[int, Carrier]]:
    """Of each group the index of its best and the best itself, as ``screened`` would choose it.

    All groups are scored together.
    """
    kept = [(n, i) for n, group in enumerate(groups) for i in _best(group, tried)]
    full = scored(loaded, [groups[n][i] for n, i in kept], *tried[:3])
    best: dict[int, tuple[int, Carrier]] = {}
    for (n, i), carrier in zip(kept, full, strict=True):
        if n not in best or by_score(carrier) < by_score(best[n][1]):
            best[n] = i, carrier
    return [best[n] for n in range(len(groups))]


def _best(carriers: Sequence[Carrier], tried: Tried) -> list[int]:
    scores = first_order(carriers, tried)
    return scores.topk(min(KEPT, len(carriers))).indices.tolist()
