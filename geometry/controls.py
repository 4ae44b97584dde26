"""An intervention with its controls: any push of the residual does something.

random          the same edit along random unit directions
matched         the same, every token moved exactly as far as the intervention moves it
wrong_layer     at one layer: the same vector there, at another layer; at all layers: the vector
                that the same position gives half of the depth away
wrong_position  the vector that the same layer gives at the first token of the request, where little
                has been read
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from geometry.interventions import (
    OPERATIONS,
    Intervention,
    ablation,
    basis,
    matched_controls,
    random_controls,
    steering,
)

Pair = tuple[Tensor, Tensor]
"""A harmfulness and a refusal vector, (d_model,) each."""


@dataclass(frozen=True)
class Site:
    """Where vectors come from and where they are written.

    ``elsewhere`` holds the vectors of another place, by the control's name.

    ``length``: residual units of a steering strength of 1 by mode (1.0: strengths are in units of
    the residual). ``outputs``: ablate what attention and MLP write too.
    """

    vectors: Pair
    elsewhere: Mapping[str, Pair]
    layers: tuple[int, ...]
    other_layers: tuple[int, ...]
    where: str = "all"
    length: float = 1.0
    outputs: bool = False


def far_layer(layer: int, n_layers: int) -> int:
    """A layer half of the depth away."""
    half = n_layers // 2
    return layer - half if layer > half else layer + half


def edit(
    mode: str, operation: str, strength: float, pair: Pair, layers: Sequence[int], site: Site
) -> Intervention:
    """One intervention of a mode with a pair of vectors."""
    rows = basis(mode, *pair)
    if operation == "ablate":
        return ablation(mode, rows, layers, strength, site.where, outputs=site.outputs)
    if operation != "steer":
        raise AttackPlaneError("unknown operation", got=operation, remedy=" or ".join(OPERATIONS))
    # both rows are orthonormal, so n(h + r) is their sum only for orthogonal directions: take the
    # directions themselves
    h, r = (v / v.norm() for v in pair)
    direction = h + r if mode == "H+R" else rows[0]
    return replace(
        steering(mode, direction, layers, strength * site.length, site.where), strength=strength
    )


def _usable(mode: str, pair: Pair) -> bool:
    """Whether another place has the directions of a mode.

    None may be zero, and two of them may not be the same: at one position harc's H and R are.
    """
    h, r = (float(v.norm()) > 0 for v in pair)
    if mode in ("H", "R"):
        return h if mode == "H" else r
    return h and r and abs(float(pair[0] @ pair[1])) < 0.999


def design(
    mode: str, operation: str, strength: float, site: Site, *, controls: int, seed: int
) -> list[Intervention]:
    """The intervention and its controls.

    The random directions are the same for all modes and strengths of a seed.

    A control whose place has no such directions is left out.
    """
    own = edit(mode, operation, strength, site.vectors, site.layers, site)
    interventions = [own]
    interventions += random_controls(own, controls, torch.Generator().manual_seed(seed))
    if operation == "ablate":
        interventions += matched_controls(own, controls, torch.Generator().manual_seed(seed + 1))
    else:  # a random direction of the same length is a matched control already
        interventions += [replace(c, kind="matched") for c in interventions[1:]]
    if len(site.layers) == 1 and site.other_layers:
        moved = edit(mode, operation, strength, site.vectors, site.other_layers, site)
        interventions.append(replace(moved, kind="wrong_layer"))
    for name, pair in site.elsewhere.items():
        if _usable(mode, pair) and not (name == "wrong_layer" and len(site.layers) == 1):
            interventions.append(
                replace(edit(mode, operation, strength, pair, site.layers, site), kind=name)
            )
    return interventions
