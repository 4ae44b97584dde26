"""Edits of a model for as long as a block is open: a direction taken out, or added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from core.errors import AttackPlaneError
from core.models import LoadedModel
from geometry.contrasts import unit
from geometry.edits import intervened
from geometry.interventions import ablation, steering


@contextmanager
def ablate(
    model: LoadedModel,
    direction: Tensor,
    *,
    layers: Sequence[int] | None = None,
    strength: float = 1.0,
) -> Iterator[None]:
    """While open, the component along a direction is taken out of the residual at every token.

    Args:
        model: the model that is edited; its hooks are gone when the block ends.
        direction: (d_model,), of any length but zero.
        layers: residual layers; None takes all of them.
        strength: the share that is taken out.

    Raises:
        AttackPlaneError: a direction of another shape or of length zero, or no such layer.
    """
    chosen = range(model.n_layers + 1) if layers is None else layers
    rows = _unit(model, direction)[None]
    with intervened(model, ablation("direction", rows, chosen, strength)):
        yield


@contextmanager
def steer(
    model: LoadedModel, direction: Tensor, strength: float, *, layers: Sequence[int]
) -> Iterator[None]:
    """While open, ``strength`` times the unit vector along a direction is added at every token.

    Args:
        model: the model that is edited; its hooks are gone when the block ends.
        direction: (d_model,), of any length but zero.
        strength: in units of the residual, negative to push the other way. The distance of the
            class means (``ModelDirections.refusal_norm[layer]``) is a natural measure.
        layers: residual layers.

    Raises:
        AttackPlaneError: a direction of another shape or of length zero, or no such layer.
    """
    vector = _unit(model, direction)
    with intervened(model, steering("direction", vector, layers, float(strength))):
        yield


def _unit(model: LoadedModel, direction: Tensor) -> Tensor:
    """(d_model,) on the CPU.

    Raises:
        AttackPlaneError: another shape, or a length of zero.
    """
    vector = direction.detach().float().cpu()
    if vector.shape != (model.d_model,) or not vector.norm() > 0:
        raise AttackPlaneError(
            "not a direction of this model",
            where=model.spec,
            got=f"shape {tuple(vector.shape)}, length {float(vector.norm()):.3g}",
            remedy=f"give one vector ({model.d_model},), such as directions.refusal[layer]",
        )
    return unit(vector)
