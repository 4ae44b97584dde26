"""Carriers: the directions that a model's refusals depend on [SG 2606.16349].

The mean-difference field holds the difference of two class means at every position and layer. Each
position and layer is a candidate. It is tried on contrast prompts:

    comply   by how much ablating it at all layers lowers outcome D on harmful prompts, nats per
             token
    refuse   by how much adding it at its own layer, at its own length, raises D on harmless
             prompts, nats per token
    kl       KL of the next token of harmless prompts under the ablation, nats. A candidate is
             admissible if this is at most 0.1.
    score    refuse + comply - kl

1. All candidates are scored by gradients (``attribution.py``), and ranked: those whose estimated
   KL is admissible by score, then the others by KL.
2. The KL of the best few is measured. The carrier is the best of these by the same ranking, where
   one standard error over the prompts is added to the KL: what was chosen for being just small
   enough is larger on other prompts.

Effects and admissibility are measured on held-out prompts afterwards.

SG scores refusing and complying too, but does not state in which units. We use D
(``evaluation/refusal_score.py``), since it moves before replies do.
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
from geometry import attribution
from geometry.contrasts import Contrast, unit
from geometry.interventions import Intervention, ablation, matched_along, steering
from geometry.layers import DEPTH, MAX_KL, inner_layers
from geometry.rollout import rollout

KEPT = 4
"""Candidates whose KL is measured."""
SCORES = ("comply", "refuse", "kl", "kl_error")
ESTIMATED = 1 / 3
"""An estimated KL is about this share of the measured one."""


@dataclass(frozen=True)
class Carrier:
    """A candidate with its scores.

    ``vector`` (d_model,) is a unit vector, ``norm`` the length that it had. ``kl_error``: standard
    error of the KL over the prompts; 0 of an estimated one.
    """

    position: str
    layer: int
    vector: Tensor
    norm: float
    comply: float = float("nan")
    refuse: float = float("nan")
    kl: float = float("nan")
    kl_error: float = 0.0

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
    """What candidates are tried on: contrast prompts, and the texts of outcome D.

    ``outputs``: ablations take a direction out of what attention and MLP write too.
    """

    harmful: Sequence[Prompt]
    harmless: Sequence[Prompt]
    texts: attribution.Texts
    outputs: bool = False


def searched_layers(n_layers: int, every: int = 1) -> range:
    """Every ``every``-th inner layer up to 80 % of the depth."""
    return range(inner_layers(n_layers).start, int(DEPTH * n_layers) + 1, every)


def candidates(field: dict[str, Contrast], layers: Sequence[int]) -> list[Carrier]:
    """The field's vectors at its positions and at these layers, where the classes differ."""
    carriers = []
    for position, contrast in field.items():
        difference, alive = contrast.difference, contrast.alive
        for layer in layers:
            if alive[layer]:
                vector = unit(difference[layer]).float()
                carriers.append(Carrier(position, layer, vector, float(difference[layer].norm())))
    if not carriers:
        raise AttackPlaneError(
            "no carrier to try: the classes do not differ at any of these positions and layers",
            got=f"positions {', '.join(field)}, layers {', '.join(map(str, layers))}",
        )
    return carriers


def scored(loaded: LoadedModel, carriers: Sequence[Carrier], tried: Tried) -> list[Carrier]:
    """The candidates with their full scores, in their order."""
    harmful, harmless, texts, _ = tried
    ablations = [_ablated(loaded, c, tried) for c in carriers]
    additions = [steering("carrier", c.vector, [c.layer], c.norm) for c in carriers]
    bad = rollout(
        loaded,
        harmful,
        [None, *ablations],
        refusals=texts.refusals,
        compliances=texts.compliances,
        description="carriers, harmful",
    )
    good = rollout(
        loaded,
        harmless,
        [None, *ablations, *additions],
        refusals=texts.refusals,
        compliances=texts.compliances,
        description="carriers, harmless",
    )
    bad_d = torch.tensor([[o.d for o in row] for row in bad]).mean(0)
    good_d = torch.tensor([[o.d for o in row] for row in good]).mean(0)
    kl, error = _mean_and_error([[o.kl for o in row] for row in good])
    n = len(carriers)
    return [
        replace(
            c,
            comply=float(bad_d[0] - bad_d[1 + i]),
            refuse=float(good_d[1 + n + i] - good_d[0]),
            kl=float(kl[1 + i]),
            kl_error=float(error[1 + i]),
        )
        for i, c in enumerate(carriers)
    ]


def estimated(
    loaded: LoadedModel, carriers: Sequence[Carrier], tried: Tried, read: Tensor | None = None
) -> list[Carrier]:
    """The candidates with their scores by gradients, in their order.

    ``read`` (d_model,): they are written in place of this direction (matched controls).
    """
    harmful, harmless, texts, _ = tried
    vectors = torch.stack([c.vector for c in carriers])
    layers, lengths = [c.layer for c in carriers], torch.tensor([c.norm for c in carriers])
    comply = -attribution.ablated(loaded, harmful, texts, vectors, read)
    refuse = attribution.added(loaded, harmless, texts, vectors, layers, lengths)
    kl = attribution.next_token_kl(loaded, harmless, vectors, read) / ESTIMATED
    return [
        replace(c, comply=float(comply[i]), refuse=float(refuse[i]), kl=float(kl[i]))
        for i, c in enumerate(carriers)
    ]


def ranked(carriers: Sequence[Carrier]) -> list[int]:
    """Indices of scored candidates, best first: safe ones by score, then the others by KL."""

    def key(i: int) -> tuple[bool, float]:
        c = carriers[i]
        safe = c.kl + c.kl_error <= MAX_KL
        return not safe, -c.score if safe else c.kl

    return sorted(range(len(carriers)), key=key)


def best_of_each(
    loaded: LoadedModel,
    groups: Sequence[Sequence[Carrier]],
    tried: Tried,
    like: Carrier | None = None,
) -> list[Carrier]:
    """The best candidate of each group, with its scores by gradients and its measured KL.

    ``like``: the candidates are written in its place, moved as far as it moves (matched controls).
    """
    read = None if like is None else like.vector
    flat = iter(estimated(loaded, [c for group in groups for c in group], tried, read))
    kept = []
    for group in groups:
        own = [next(flat) for _ in group]
        kept.append([own[i] for i in ranked(own)[:KEPT]])
    every = [c for few in kept for c in few]
    if like is None:
        edits = [_ablated(loaded, c, tried) for c in every]
    else:
        of = _ablated(loaded, like, tried)
        edits = [of, *matched_along(of, [c.vector[None] for c in every])]
    rows = rollout(loaded, tried.harmless, edits, description="KL of candidates")
    means, errors = _mean_and_error([[o.kl for o in row] for row in rows])
    kl = zip(means[-len(every) :].tolist(), errors[-len(every) :].tolist(), strict=True)
    best = []
    for few in kept:
        measured = [replace(c, kl=mean, kl_error=e) for c, (mean, e) in zip(few, kl, strict=False)]
        best.append(measured[ranked(measured)[0]])
    return best


def _mean_and_error(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """(prompt, edit) numbers -> (edit,) means and standard errors over prompts."""
    values = torch.tensor(rows, dtype=torch.float64)
    n = len(values)
    errors = values.std(0) / n**0.5 if n > 1 else torch.zeros_like(values[0])
    return values.mean(0), errors


def _ablated(loaded: LoadedModel, carrier: Carrier, tried: Tried) -> Intervention:
    every = range(loaded.n_layers + 1)
    return ablation("carrier", carrier.vector[None], every, outputs=tried.outputs)
