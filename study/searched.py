"""Directions that mean nothing, searched for as hard as a carrier was.

A carrier is the best of many candidates. A random direction beside it would lose even if nothing
were there. So each control is the best of as many candidates at the same places, by the same score,
chosen in the same way (``geometry/carriers.py``):

    permuted   the labels of the contrast prompts are dealt anew, pairs swapped or not, and all
               candidates are estimated again
    random     random unit vectors stand in for the candidates, with their lengths

Every choice is made on contrast prompts. What is measured with them is measured on held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from core.rows import Row
from geometry.carriers import Carrier, best_of_each
from geometry.contrasts import unit
from geometry.resampling import permuted_differences, permuted_sides
from study.study import Study

KINDS = ("matched", "permuted")


def searched(study: Study, carrier: str, kind: str, n: int) -> list[Carrier]:
    """``n`` directions that mean nothing, each the best of as many candidates as the carrier.

    Args:
        carrier: ``H`` or ``R``, whose candidates they stand in for.
        kind: ``permuted``, or ``matched``: random ones, which the caller moves as far as the
            carrier moves.
    """
    tried = study.candidates(carrier)
    groups = _permuted(study, carrier, tried, n) if kind == "permuted" else _random(study, tried, n)

    def make() -> list[Row]:
        return [c.to_row() for c in best_of_each(study.loaded, groups, study.tried)]

    depends = [kind, n, study.config.seed, *study.search_identity(carrier)]
    rows = study.kept("searched controls", depends, make)
    chosen = []
    for group, row in zip(groups, rows, strict=True):
        by_place = {(c.position, c.layer): c for c in group}
        scores = {name: row[name] for name in ("comply", "refuse", "kl")}
        chosen.append(replace(by_place[row["position"], row["layer"]], **scores))
    return chosen


def _permuted(study: Study, carrier: str, tried: Sequence[Carrier], n: int) -> list[list[Carrier]]:
    field = study.field(carrier)
    generator = torch.Generator().manual_seed(study.config.seed + 1)
    sides = permuted_sides(list(field.values()), n, generator)
    dealt: dict[str, Tensor] = {
        position: permuted_differences(contrast, own)
        for (position, contrast), own in zip(field.items(), sides, strict=True)
    }
    return [[_as(c, dealt[c.position][draw, c.layer]) for c in tried] for draw in range(n)]


def _random(study: Study, tried: Sequence[Carrier], n: int) -> list[list[Carrier]]:
    generator = torch.Generator().manual_seed(study.config.seed + 2)
    drawn = unit(torch.randn(n, len(tried), study.loaded.d_model, generator=generator))
    return [[_as(c, c.norm * v) for c, v in zip(tried, vectors, strict=True)] for vectors in drawn]


def _as(place: Carrier, difference: Tensor) -> Carrier:
    """A candidate at this place with another vector."""
    return Carrier(place.position, place.layer, unit(difference).float(), float(difference.norm()))
