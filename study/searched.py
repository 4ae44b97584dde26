"""Directions that mean nothing, searched for as hard as a carrier was.

A carrier is the best of many candidates. A random direction beside it would lose even if nothing
were there. So each control is the best of as many candidates, by the same scores on the same
prompts, chosen in the same way (``geometry/carriers.py``):

    permuted   the labels of the contrast prompts are dealt anew, pairs swapped or not, and all
               candidates are estimated again. The best is ablated, or added, as the carrier is
    matched    half as many random directions, with both signs, written in the carrier's place:
               every token is moved exactly as far as the carrier moves it. They are scored as such

Every choice is made on contrast prompts. What is measured with them is measured on held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from core.rows import Row
from geometry.carriers import SCORES, Carrier, best_of_each
from geometry.contrasts import unit
from geometry.resampling import permuted_differences, permuted_sides
from study.study import Study

KINDS = ("matched", "permuted")


def searched(study: Study, carrier: str, kind: str, n: int) -> list[Carrier]:
    """``n`` directions that mean nothing, each the best of as many candidates as the carrier.

    Args:
        carrier: ``H`` or ``R``, whose candidates they stand in for.
        kind: one of ``KINDS``.
    """
    tried = study.candidates(carrier)
    like = study.carrier(carrier) if kind == "matched" else None
    groups = (
        _permuted(study, carrier, tried, n) if like is None else _random(study, like, len(tried), n)
    )

    def make() -> list[Row]:
        best = best_of_each(study.loaded, groups, study.tried, like)
        chosen = []
        for group, c in zip(groups, best, strict=True):
            index = next(i for i, other in enumerate(group) if other.vector is c.vector)
            chosen.append({"index": index} | c.to_row())
        return chosen

    depends = [kind, n, study.config.seed, *study.search_identity(carrier)]
    depends += [study.place(like)] if like else []
    rows = study.kept("searched controls", depends, make)
    return [
        replace(group[row["index"]], **{name: row[name] for name in SCORES})
        for group, row in zip(groups, rows, strict=True)
    ]


def _permuted(study: Study, carrier: str, tried: Sequence[Carrier], n: int) -> list[list[Carrier]]:
    field = study.field(carrier)
    generator = torch.Generator().manual_seed(study.config.seed + 1)
    sides = permuted_sides(list(field.values()), n, generator)
    dealt: dict[str, Tensor] = {
        position: permuted_differences(contrast, own)
        for (position, contrast), own in zip(field.items(), sides, strict=True)
    }
    return [[_as(c, dealt[c.position][draw, c.layer]) for c in tried] for draw in range(n)]


def _random(study: Study, like: Carrier, count: int, n: int) -> list[list[Carrier]]:
    generator = torch.Generator().manual_seed(study.config.seed + 2)
    drawn = unit(torch.randn(n, -(-count // 2), study.loaded.d_model, generator=generator))
    signed = [[_as(like, s * v) for v in vectors for s in (1.0, -1.0)] for vectors in drawn]
    return [group[:count] for group in signed]


def _as(place: Carrier, direction: Tensor) -> Carrier:
    """A candidate at this place, and of its length, along another direction."""
    return Carrier(place.position, place.layer, unit(direction).float(), place.norm)
