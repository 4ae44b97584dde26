"""Ablation and steering of directions in the residual stream, by hooks inside a context manager.

One linear edit covers both. It is applied to every touched token of a residual layer [SG
2606.16349, Arditi 2406.11717]:

    a <- a - sum_k (read_k . a) write_k + shift

    ablation of u      read = u, write = lambda u. With lambda = 1 nothing is left along u.
    ablation of a span read is an orthonormal basis of the span, write is lambda times read.
    steering by u      shift = lambda u. lambda is in units of the residual.
    matched control    write = lambda w for a random w. The number (read . a) is taken from the
                       intervention's own row in the same pass. Every token is thus moved exactly
                       as far as by the intervention, at every layer, along another direction.

The modes combine a harmfulness direction h with a refusal direction r. H and R are the directions
alone. H+R ablates their span, or steers by the unit vector of h + r. H-R is h without its component
along r, at unit length; R-H is the reverse.

Residual layers are numbered as everywhere: layer L enters block L, and n_layers leaves the last
block. Within a block, attention may write the direction back before the MLP reads. SG leaves it
there. Arditi edits the outputs of attention and MLP too (``outputs``), which is the same as taking
the direction out of all weights that write to the residual.

``where`` names the touched tokens: ``all``, the ``prompt``, the ``reply``, one position (such as
``t_inst`` or ``-1``), or a range of positions (``t_inst..t_post_inst``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import AttackPlaneError, nearest
from core.prompt import Prompt
from geometry.activations import span_of
from geometry.contrasts import unit

MODES = ("H", "R", "H+R", "H-R", "R-H")
OPERATIONS = ("ablate", "steer")


@dataclass(frozen=True)
class Intervention:
    """One edit at some residual layers.

    Attributes:
        read, write: (k, d_model), or None where nothing is ablated.
        shift: (d_model,), or None where nothing is added.
        kind: its part in a study: the intervention itself, or the name of a control.
        draw: the number of the control among those of its kind.
    """

    name: str
    layers: tuple[int, ...]
    read: Tensor | None = None
    write: Tensor | None = None
    shift: Tensor | None = None
    where: str = "all"
    kind: str = "intervention"
    strength: float = 0.0
    draw: int = 0
    follows: Intervention | None = None
    """The intervention whose (read . a) is taken, in the same batch."""
    outputs: bool = False
    """Edit what attention and MLP write too, before it joins the residual (Arditi's ablation)."""

    @property
    def rank(self) -> int:
        return 1 if self.write is None else len(self.write)

    @property
    def operation(self) -> str:
        return "ablate" if self.shift is None else "steer"


def without(first: Tensor, second: Tensor) -> Tensor:
    """``first`` without its component along ``second``, at unit length: (d_model,).

    Raises:
        AttackPlaneError: nothing is left of it.
    """
    second = unit(second.double())
    rest = first.double() - (first.double() @ second) * second
    if rest.norm() < 1e-6 * first.norm():
        raise AttackPlaneError(
            "the two directions are parallel: nothing is left of one without the other"
        )
    return unit(rest).float()


def basis(mode: str, h: Tensor, r: Tensor) -> Tensor:
    """Orthonormal rows that span a mode's directions: (k, d_model), k = 2 for H+R and 1 otherwise.

    Raises:
        AttackPlaneError: an unknown mode, or a direction of length zero.
    """
    if mode not in MODES:
        raise AttackPlaneError("unknown mode", got=mode, remedy=nearest(mode, list(MODES)))
    for name, direction in (("harmfulness", h), ("refusal", r)):
        if name[0].upper() in mode and not direction.norm() > 0:
            raise AttackPlaneError(
                f"there is no {name} direction at this layer", remedy="choose another layer"
            )
    if mode == "H":
        return unit(h)[None]
    if mode == "R":
        return unit(r)[None]
    if mode == "H+R":
        return torch.stack([unit(h), without(r, h)])
    return without(h, r)[None] if mode == "H-R" else without(r, h)[None]


def ablation(
    name: str,
    rows: Tensor,
    layers: Sequence[int],
    strength: float = 1.0,
    where: str = "all",
    *,
    outputs: bool = False,
) -> Intervention:
    """Takes ``strength`` times the component in the span of ``rows`` out of the residual.

    ``rows`` is (k, d_model) and orthonormal. ``outputs``: also out of what attention and MLP write.
    """
    write = strength * rows
    return Intervention(
        name, tuple(layers), rows, write, None, where, strength=strength, outputs=outputs
    )


def steering(
    name: str, direction: Tensor, layers: Sequence[int], strength: float, where: str = "all"
) -> Intervention:
    """Adds ``strength`` times the unit vector along ``direction`` (d_model,)."""
    shift = strength * unit(direction)
    return Intervention(name, tuple(layers), None, None, shift, where, "intervention", strength)


def random_rows(k: int, d_model: int, generator: torch.Generator) -> Tensor:
    """(k, d_model) orthonormal rows in a random direction."""
    return torch.linalg.qr(torch.randn(d_model, k, generator=generator)).Q.T.contiguous()


def random_controls(of: Intervention, n: int, generator: torch.Generator) -> list[Intervention]:
    """The same edit along ``n`` random unit directions, as the papers do it.

    An ablation of a random direction moves tokens less than one of the real direction.
    """
    return [_along(of, w, w, "random", draw) for draw, w in enumerate(_drawn(of, n, generator))]


def matched_controls(of: Intervention, n: int, generator: torch.Generator) -> list[Intervention]:
    """Random directions along which every token is moved as far as ``of`` moves it.

    The length comes from ``of``'s row in the same batch. Reading it in the control's own residual
    would be wrong at several layers, since the control never takes the direction away.
    """
    return matched_along(of, _drawn(of, n, generator))


def matched_along(of: Intervention, rows: Sequence[Tensor]) -> list[Intervention]:
    """As ``matched_controls``, along given directions: (k, d_model) orthonormal rows each."""
    found = [_along(of, of.read, w, "matched", draw) for draw, w in enumerate(rows)]
    if of.shift is not None:  # of the same length already
        return found
    return [dataclasses.replace(control, follows=of) for control in found]


def _drawn(of: Intervention, n: int, generator: torch.Generator) -> list[Tensor]:
    vectors = of.shift if of.write is None else of.write
    assert vectors is not None  # an intervention has one or the other
    return [random_rows(of.rank, vectors.shape[-1], generator) for _ in range(n)]


def _along(
    of: Intervention, read: Tensor | None, rows: Tensor, kind: str, draw: int
) -> Intervention:
    if of.shift is not None:
        length = math.copysign(float(of.shift.norm()), of.strength)
        return dataclasses.replace(of, shift=length * rows[0], kind=kind, draw=draw)
    return dataclasses.replace(of, read=read, write=of.strength * rows, kind=kind, draw=draw)


def touched(prompt: Prompt, where: str) -> tuple[Tensor, bool]:
    """Which tokens of the prompt are edited, (prompt tokens,) bool, and whether the reply is.

    Raises:
        AttackPlaneError: no such place.
    """
    mask = torch.zeros(len(prompt.ids))
    if where in ("all", "prompt", "reply"):
        mask += where != "reply"
        return mask, where != "prompt"
    first, _, last = where.partition("..")
    start, stop = span_of(prompt, first), span_of(prompt, last or first)
    if start is None or stop is None or stop.stop > len(mask) or start.start >= stop.stop:
        raise AttackPlaneError(
            "no such place in the prompt",
            got=where,
            remedy="all, prompt, reply, t_inst, -1, or FIRST..LAST",
        )
    mask[start.start : stop.stop] = 1
    return mask, False
