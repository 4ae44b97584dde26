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
block. Within a block, attention may write the direction back before the MLP reads. Arditi projects
the output of attention too. SG does not, and neither do we.

``where`` names the touched tokens: ``all``, the ``prompt``, the ``reply``, one position (such as
``t_inst`` or ``-1``), or a range of positions (``t_inst..t_post_inst``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import AttackPlaneError
from core.hooks import before_block
from core.models import LoadedModel
from core.prompt import Prompt
from core.records import nearest
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
    name: str, rows: Tensor, layers: Sequence[int], strength: float = 1.0, where: str = "all"
) -> Intervention:
    """Takes ``strength`` times the component in the span of ``rows`` out of the residual.

    ``rows`` is (k, d_model) and orthonormal.
    """
    return Intervention(
        name, tuple(layers), rows, strength * rows, None, where, "intervention", strength
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
        return dataclasses.replace(of, shift=of.shift.norm() * rows[0], kind=kind, draw=draw)
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


class Edits:
    """The interventions of a batch's rows, stacked.

    Attributes:
        mask: (row, fed token), which tokens the next pass edits; None edits all of them.
        moved: (row,), the summed length of what was added to tokens.
        count: (row,), how many tokens that were.
    """

    def __init__(
        self, rows: Sequence[Intervention | None], d_model: int, device: torch.device | str
    ) -> None:
        self.mask: Tensor | None = None
        self.moved, self.count = torch.zeros(len(rows)), torch.zeros(len(rows))
        self._device = device
        own = {id(row): i for i, row in reversed(list(enumerate(rows))) if row}
        self.leader = torch.arange(len(rows), device=device)
        """(row,) whose (read . a) each row takes: its own, or that of the nearest earlier row that
        it follows."""
        for i, row in enumerate(rows):
            if row and row.follows:
                before = [j for j in range(i) if rows[j] is row.follows]
                self.leader[i] = before[-1] if before else own[id(row.follows)]
        self.layers = sorted({layer for row in rows if row for layer in row.layers})
        rank = max([0, *(len(row.read) for row in rows if row and row.read is not None)])
        self._stacked: dict[tuple[int, ...], list[Tensor]] = {}
        self._at = {}
        for layer in self.layers:
            here = tuple(i for i, row in enumerate(rows) if row and layer in row.layers)
            if here not in self._stacked:
                self._stacked[here] = self._stack(rows, here, rank, d_model)
            self._at[layer] = here

    def _stack(
        self, rows: Sequence[Intervention | None], here: Sequence[int], rank: int, d: int
    ) -> list[Tensor]:
        """The rows' read, write and shift, and which rows are edited.

        A row without an edit holds zeros, which leave it as it was, to the bit.
        """
        read, write = torch.zeros(len(rows), rank, d), torch.zeros(len(rows), rank, d)
        shift, edited = torch.zeros(len(rows), 1, d), torch.zeros(len(rows), 1)
        for i in here:
            row = rows[i]
            assert row is not None
            edited[i] = 1
            if row.read is not None and row.write is not None:
                read[i, : len(row.read)], write[i, : len(row.read)] = row.read, row.write
            if row.shift is not None:
                shift[i, 0] = row.shift
        return [t.to(self._device) for t in (read, write, shift, edited)]

    def select(self, keep: Tensor) -> None:
        """Go on with some rows only."""
        self._stacked = {k: [t[keep] for t in v] for k, v in self._stacked.items()}
        self.mask = None if self.mask is None else self.mask[keep]
        self.moved, self.count = self.moved[keep.cpu()], self.count[keep.cpu()]
        new = torch.zeros_like(self.leader)
        new[keep] = torch.arange(len(keep), device=new.device)
        self.leader = new[self.leader[keep]]

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """(row, fed, d_model) -> the same, edited."""
        read, write, shift, edited = self._stacked[self._at[layer]]
        a, leader = hidden.float(), self.leader
        if len(read) == 1 != len(a):  # one intervention for whatever the model is given
            read, write = (t.expand(len(a), -1, -1) for t in (read, write))
            leader = torch.arange(len(a), device=leader.device)
        components = torch.bmm(a, read.transpose(1, 2))[leader]
        change = shift - torch.bmm(components, write)
        mask = torch.ones_like(a[..., 0]) if self.mask is None else self.mask
        change = change * mask[..., None]
        moved = change.detach().norm(dim=-1).sum(1).cpu()
        count = (mask * edited).sum(1).cpu()
        shared = len(self.moved) == 1 != len(moved)
        self.moved += moved.sum() if shared else moved
        self.count += count.sum() if shared else count
        return (a + change).to(hidden.dtype)


@contextmanager
def edited(loaded: LoadedModel, edits: Edits) -> Iterator[None]:
    """While open, forward passes of the model are edited. The hooks always go when it closes."""
    handles = []

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return edits(loaded.n_layers, output[0]), *output[1:]
        return edits(loaded.n_layers, output)

    try:
        for layer in edits.layers:
            if not 0 <= layer <= loaded.n_layers:
                raise AttackPlaneError(
                    "no such layer", where=loaded.spec, got=layer, remedy=f"0 to {loaded.n_layers}"
                )
            if layer < loaded.n_layers:
                handles.append(before_block(loaded.blocks[layer], partial(edits, layer)))
            else:
                handles.append(loaded.blocks[-1].register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def intervened(loaded: LoadedModel, intervention: Intervention) -> Iterator[None]:
    """While open, every token that the model reads is edited, whatever ``where`` says."""
    with edited(loaded, Edits([intervention], loaded.d_model, loaded.device)):
        yield
