"""Reads the residual stream of many prompts: a few positions, all layers, one forward pass.

Layer L is the residual that enters block L. Layer n_layers is what leaves the last block, before
the final norm. Positions have names:

    t_first      first token of the user content
    t_goal       last token of the original request
    t_inst       last token of the user content
    t_post_inst  last template token before the reply
    -1 .. -N     counted from the end of the prompt; -1 is t_post_inst, and Arditi 2406.11717 reads
                 -5..-1
    response     mean over the first 32 tokens of a reply [HARC 2607.00572]; the prompt must be
                 rendered with this reply as its target

How it is made fast:

1. Tokens that all prompts share at the start, such as the system prompt, are run once.
2. Prompts are sorted by length. They are packed one after another, without padding, into batches of
   a few hundred tokens. On a CPU two batches run side by side (``core/packed.py``). The longest
   prompt is compared with a plain pass. If the two differ, prompts are padded on the right instead,
   where causal attention cannot see the padding.
3. Hooks keep only the wanted positions. Memory beyond the model's own does not grow with the length
   of the prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from core.batching import BatchSize
from core.errors import AttackPlaneError
from core.hooks import before_block
from core.models import LoadedModel
from core.packed import Group, PackedDecoder
from core.prefix import SharedPrefix, keeps_keys_and_values_only, shared_length
from core.progress import bar as progress_bar
from core.prompt import Prompt
from core.readings import Activations

log = logging.getLogger(__name__)

POSITIONS = ("t_goal", "t_inst", "t_post_inst")
RESPONSE, RESPONSE_TOKENS = "response", 32
READ_AT_ONCE = 4096
"""Prompts of a ``Gathering`` that wait to be read together."""
CPU_TOKENS, GPU_TOKENS = 2048, 32768
"""Fed tokens of a batch. On a CPU more is slower: what passes between the products no longer fits
the caches."""
AGREEMENT = 1e-3
"""Largest difference from a plain pass, relative to a layer's largest entry, at which packing is
trusted (float32)."""


def span_of(prompt: Prompt, position: str) -> range | None:
    """The tokens of ``prompt.ids + prompt.target_ids`` that a position names, or None.

    Raises:
        AttackPlaneError: no such position name.
    """
    if position == RESPONSE:
        n = min(RESPONSE_TOKENS, len(prompt.target_ids))
        return range(len(prompt.ids), len(prompt.ids) + n) if n else None
    if position == "t_first":
        return range(prompt.content.start, prompt.content.start + 1)
    if position in POSITIONS:
        index: int | None = getattr(prompt, position)
        return None if index is None else range(index, index + 1)
    if position.startswith("-") and position[1:].isdigit() and int(position):
        index = len(prompt.ids) + int(position)
        return range(index, index + 1) if index >= 0 else None
    raise AttackPlaneError(
        "unknown position",
        got=position,
        remedy="t_first, t_goal, t_inst, t_post_inst, response, or -1, -2, ...",
    )


@contextmanager
def read_residuals(loaded: LoadedModel, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, a forward pass calls ``keep(layer, residual)`` for layers 0 to n_layers.

    ``residual`` is (batch, fed, d_model). The hooks go when it closes, errors included.
    """

    def after(_: Any, __: Any, output: Any) -> None:
        keep(loaded.n_layers, output[0] if isinstance(output, tuple) else output)

    handles = [
        before_block(block, partial(keep, layer)) for layer, block in enumerate(loaded.blocks)
    ]
    handles.append(loaded.blocks[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Wanted:
    """Where the wanted tokens of a batch stand in its flattened tokens, and whose they are."""

    tokens: Tensor
    owners: Tensor
    lengths: Tensor
    out: Tensor
    """(row, layer, position, d_model), float32 on the CPU."""
    layers: Mapping[int, int]
    """Where each wanted layer stands in ``out``."""

    def keep(self, layer: int, hidden: Tensor) -> None:
        if layer not in self.layers:
            return
        picked = hidden.flatten(0, -2)[self.tokens].float().cpu()
        if len(picked) != len(self.lengths):  # means over several tokens, in float64
            sums = torch.zeros(len(self.lengths), picked.shape[1], dtype=torch.float64)
            picked = (
                sums.index_add_(0, self.owners, picked.double()) / self.lengths[:, None]
            ).float()
        self.out[:, self.layers[layer]] = picked.view(-1, *self.out.shape[2:])


class _Reader:
    """Feeds prompts and writes the wanted residuals into ``resid`` (prompt, layer, position,
    d_model)."""

    def __init__(
        self,
        loaded: LoadedModel,
        ids: list[list[int]],
        spans: list[list[range]],
        shared: int,
        layers: Sequence[int],
    ) -> None:
        self.loaded, self.ids, self.spans = loaded, ids, spans
        self.prefix = torch.tensor(ids[0][:shared], dtype=torch.long, device=loaded.device)
        self.shared = shared
        self.layers = {layer: row for row, layer in enumerate(layers)}
        self.resid = torch.empty(len(ids), len(layers), len(spans[0]), loaded.d_model)
        self._packed: PackedDecoder | None = None
        self._plain: SharedPrefix | None = None

    def fed(self, i: int) -> int:
        return len(self.ids[i]) - self.shared

    def _wanted(self, rows: Sequence[int], starts: Sequence[int]) -> _Wanted:
        """``starts``: where each row's first fed token stands in the flattened batch."""
        spans = [
            range(s.start - self.shared + at, s.stop - self.shared + at)
            for i, at in zip(rows, starts, strict=True)
            for s in self.spans[i]
        ]
        lengths = torch.tensor([len(s) for s in spans])
        owners = torch.arange(len(spans)).repeat_interleave(lengths)
        tokens = torch.tensor([t for s in spans for t in s], device=self.loaded.device)
        out = torch.empty(len(rows), *self.resid.shape[1:])
        return _Wanted(tokens, owners, lengths, out, self.layers)

    @torch.no_grad()
    def plain(self, rows: Sequence[int]) -> None:
        """Rows padded on the right, after the cached prefix where the model's cache allows it."""
        if self._plain is None:
            self._plain = SharedPrefix(self.loaded, self.prefix)
            if not self._plain.usable:
                self.shared = 0
        longest = max(map(self.fed, rows))
        fed = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, i in enumerate(rows):
            fed[row, : self.fed(i)] = torch.tensor(self.ids[i][self.shared :])
        cache = {"past_key_values": self._plain.expanded(len(rows))} if self.shared else {}
        wanted = self._wanted(rows, [row * longest for row in range(len(rows))])
        with read_residuals(self.loaded, wanted.keep):
            self.loaded.decoder(
                input_ids=fed.to(self.loaded.device), use_cache=bool(self.shared), **cache
            )
        self.resid[list(rows)] = wanted.out

    @torch.no_grad()
    def packed(self, rows: Sequence[int]) -> None:
        """Rows one after another in a flat batch, in two side by side on a CPU. ``rows`` are sorted
        by length."""
        if self._packed is None:
            self._packed = PackedDecoder(self.loaded)
            if self.shared:
                self._packed.hidden(
                    self._embedded(self.prefix), [Group(0, self.shared, 1)], keep=self.shared
                )
        decoder = self._packed
        two = self.loaded.side_by_side and len(rows) > 1
        parts = [list(rows[start::2]) for start in (0, 1)] if two else [list(rows)]
        batches, wanted = [], {}
        for part in parts:
            lengths = [self.fed(i) for i in part]
            groups = [Group(self.shared, n, len(list(same))) for n, same in groupby(lengths)]
            fed = torch.tensor([t for i in part for t in self.ids[i][self.shared :]])
            starts = [sum(lengths[:row]) for row in range(len(part))]
            batches.append((self._embedded(fed.to(self.loaded.device)), groups))
            wanted[id(groups)] = self._wanted(part, starts)
        with read_residuals(
            self.loaded, lambda layer, h: wanted[id(decoder.current)].keep(layer, h)
        ):
            if two:
                decoder.hidden_of_two(batches)
            else:
                decoder.hidden(*batches[0])
        for part, (_, groups) in zip(parts, batches, strict=True):
            self.resid[part] = wanted[id(groups)].out

    def _embedded(self, ids: Tensor) -> Tensor:
        return self.loaded.model.get_input_embeddings()(ids)

    def fault_of_packing(self, row: int) -> str | None:
        """Why packing is wrong on this model, tried on one prompt; None if it is right."""
        if not keeps_keys_and_values_only(self.loaded):
            return "it keeps more than keys and values"
        try:
            self.packed([row])
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        again = self.resid[row].clone()
        self.plain([row])
        scale = self.resid[row].abs().amax((1, 2), keepdim=True).clamp_min(1e-6)
        worst = float(((again - self.resid[row]) / scale).abs().nan_to_num(torch.inf).max())
        bound = AGREEMENT if self.loaded.dtype == torch.float32 else 100 * AGREEMENT
        return (
            None
            if worst <= bound
            else f"residuals differ by {worst:.1g} of the layer's largest entry"
        )


def collect(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[str],
    *,
    positions: Sequence[str] = POSITIONS,
    layers: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    share_prefix: bool = True,
    packed: bool = True,
    description: str = "activations",
) -> Activations:
    """Residuals of ``prompts`` at ``positions``; NaN where a prompt has no such position.

    Args:
        layers: only these are kept, for many prompts [default: all].
        batch_tokens: fed tokens of a batch; halved when the device runs out of memory.
        packed: False pads prompts on the right in place of packing them.
    """
    if not prompts:
        raise AttackPlaneError("no prompts to read", where=loaded.spec)
    spans_of = [[span_of(p, name) for name in positions] for p in prompts]
    spans = [
        [s or range(p.t_inst, p.t_inst + 1) for s in row]
        for p, row in zip(prompts, spans_of, strict=True)
    ]
    # nothing after the last wanted token can change it, unless a hook reads the whole prompt
    ids = [
        [*p.ids, *p.target_ids][: None if loaded.hook else max(s.stop for s in row)]
        for p, row in zip(prompts, spans, strict=True)
    ]
    first = min(s.start for row in spans for s in row)
    shared = shared_length(ids, first) if share_prefix else 0
    wanted = range(loaded.n_layers + 1) if layers is None else layers
    within = all(0 <= layer <= loaded.n_layers for layer in wanted)
    if not within or len({*wanted}) < len(wanted) or not len(wanted):
        got, remedy = [*wanted], f"each once, 0 to {loaded.n_layers}"
        raise AttackPlaneError("no such layers", where=loaded.spec, got=got, remedy=remedy)
    reader = _Reader(loaded, ids, spans, shared, wanted)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    if packed and (fault := reader.fault_of_packing(order[-1])):
        log.warning("%s: prompts are padded, not packed (%s)", loaded.spec, fault)
        packed = False
    read = reader.packed if packed else reader.plain
    tokens = batch_tokens or (CPU_TOKENS if loaded.device.type == "cpu" else GPU_TOKENS)
    with progress_bar(len(prompts), description, "prompt") as bar:

        def work(part: Sequence[int]) -> None:
            read(part)
            bar.update(len(part))

        for _ in BatchSize(tokens).over(order, work, cost=reader.fed):
            pass
    for row, spans_found in enumerate(spans_of):
        for column, span in enumerate(spans_found):
            if span is None:
                reader.resid[row, :, column] = torch.nan
    kept = None if layers is None else tuple(layers)
    names = tuple(positions), tuple(prompt_ids)
    return Activations(reader.resid, *names, loaded.spec, layers=kept)


class Gathering:
    """``collect`` for more prompts than the memory holds: they are read, and dropped, as they come.

    Args:
        options: those of ``collect``.
    """

    def __init__(self, loaded: LoadedModel, **options: Any) -> None:
        self.loaded, self.options = loaded, options
        self._parts: list[Activations] = []
        self._waiting: list[tuple[Prompt, str]] = []
        self._count = 0

    def add(self, prompt: Prompt, prompt_id: str) -> int:
        """The row that this prompt's residuals will be in."""
        self._waiting.append((prompt, prompt_id))
        self._count += 1
        if len(self._waiting) >= READ_AT_ONCE:
            self._read()
        return self._count - 1

    def _read(self) -> None:
        prompts, ids = zip(*self._waiting, strict=True) if self._waiting else ((), ())
        self._parts.append(collect(self.loaded, prompts, ids, **self.options))
        self._waiting = []

    def activations(self) -> Activations:
        """Residuals of all prompts, in the order in which they were added.

        Raises:
            AttackPlaneError: there are none.
        """
        if self._waiting or not self._parts:
            self._read()
        if len(self._parts) > 1:  # one tensor for all, which each part leaves as it comes in
            first = self._parts[0]
            resid = torch.empty(self._count, *first.resid.shape[1:])
            names: list[str] = []
            while self._parts:
                part = self._parts.pop(0)
                resid[len(names) : len(names) + len(part.resid)] = part.resid
                names += part.prompt_ids
            self._parts = [replace(first, resid=resid, prompt_ids=tuple(names))]
        return self._parts[0]
