"""Runs many continuations of one sequence in one flat batch, and computes what they share once.

A prompt's prefix is shared by every candidate. So is the current suffix, up to the position where
a candidate differs from it. The keys and values of these shared tokens are kept once and never
copied per row. The tokens that are left lie one after another in a batch of one sequence. Every
matrix product is then one large dense product, and nothing is padded.

1. The model runs with explicit position ids and with an attention function of ours, which
   transformers' ``AttentionInterface`` allows.
2. Our function cuts queries, keys and values into groups of rows of equal length. It puts the
   shared keys and values before each row's own. Then it calls the model's own attention function
   with a causal mask, or a sliding one where the layer has one. So a family's special features,
   such as soft-capping, stay as they are.

Nothing is assumed about a family. The caller compares one result with a plain pass, as
``attacks/packed_scorer.py`` does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.models import LoadedModel
from core.threads import side_by_side

NAME = "attack_plane_packed"
MASKS = 256
"""Attention masks that are kept."""


def attentions() -> Any:
    """transformers' attention functions by name; imported late, since that takes seconds."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Group:
    """``count`` rows that each feed ``length`` tokens after ``shared`` shared ones."""

    shared: int
    length: int
    count: int

    @property
    def tokens(self) -> int:
        return self.length * self.count


def is_unusual(options: Mapping[str, Any]) -> bool:
    """Whether attention with these options is more than scaled products."""
    return any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention without copies of keys and values for grouped queries.

    transformers repeats each key-value head once for every query head that uses it. Here the query
    heads of one key-value head become more rows of the same product. ``attention_mask`` must hold
    one copy for each of them. Calls with unusual options go to transformers' own function.
    """
    if is_unusual(options):
        whole = attentions()["sdpa"]
        mask = attention_mask[:, :, : query.shape[2]]
        return whole(module, query, key, value, mask, scaling=scaling, **options)
    rows, heads, length, _ = query.shape
    folded = query.reshape(rows, key.shape[1], heads // key.shape[1] * length, -1)
    attended = nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask, scale=scaling
    )
    return attended.reshape(rows, heads, length, -1).transpose(1, 2), None


def attend_after(
    start: tuple[Tensor, Tensor],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float | None,
) -> Tensor:
    """Attention of one token of every row, where all rows begin with the same tokens.

    What the rows share is multiplied once for all of them.

    Args:
        start: keys and values of the shared tokens, (1, key-value heads, shared, head dim) each.
        query: (row, heads, 1, head dim)
        keys, values: (row, key-value heads, seen, head dim); the shared tokens come first.
        mask: (row, 1, 1, seen) added to the scores; 0 for shared tokens.

    Returns:
        (row, 1, heads, head dim)
    """
    (rows, heads, _, width), few = query.shape, keys.shape[1]
    shared_k, shared_v = (states[0] for states in start)
    shared, each = shared_k.shape[1], heads // few
    k, v = (states[:, :, shared:].flatten(0, 1) for states in (keys, values))
    q = (query * (width**-0.5 if scaling is None else scaling)).view(rows, few, each, width)
    together = q.permute(1, 0, 2, 3).reshape(few, rows * each, width)
    common = torch.bmm(together, shared_k.mT).unflatten(1, (rows, each)).transpose(0, 1)
    own = torch.bmm(q.flatten(0, 1), k.mT).unflatten(0, (rows, few)) + mask[..., shared:]
    weights = torch.cat([common, own], -1).softmax(-1)  # (row, key-value heads, each, seen)
    common = weights[..., :shared].transpose(0, 1).reshape(few, rows * each, shared)
    attended = torch.bmm(weights[..., shared:].flatten(0, 1), v).unflatten(0, (rows, few))
    attended += torch.bmm(common, shared_v).unflatten(1, (rows, each)).transpose(0, 1)
    return attended.reshape(rows, 1, heads, -1)


class PackedDecoder:
    """Runs rows that continue one shared sequence, whose keys and values it keeps by module.

    Args:
        original: of a model that ``loaded`` is a copy of. The shared sequence is the one that it
            keeps, here too.
    """

    def __init__(self, loaded: LoadedModel, original: PackedDecoder | None = None) -> None:
        self.loaded = loaded
        self._known: dict[nn.Module, tuple[Tensor, Tensor]] = original._known if original else {}
        whose = (original or self).loaded.model
        self._keeper = dict(zip(loaded.model.modules(), whose.modules(), strict=True))
        self._masks: dict[Any, Tensor] = {}
        self._now = threading.local()  # what a thread runs: groups and keep of a batch, or a lane
        self._original: str | None = None  # the model's own attention while ours is in its place

    @property
    def current(self) -> Sequence[Group]:
        """The groups that the calling thread runs now: a hook learns which batch it sees."""
        return self._now.groups

    @property
    def positions(self) -> Tensor:
        """(fed tokens,) the positions of what the calling thread runs now."""
        return self._now.positions

    def hidden(
        self,
        embeddings: Tensor,
        groups: Sequence[Group],
        *,
        keep: int = 0,
        leading: bool = False,
    ) -> Tensor:
        """Final hidden states of all fed tokens, after the last norm.

        Args:
            embeddings: (fed tokens of all rows, d_model), row after row in the order of ``groups``.
            keep: used with one group of one row. The keys and values of the first ``keep`` tokens
                of shared sequence and row become the shared sequence from here on. 0 changes
                nothing.
            leading: the first group is one row, and is what the other groups share. Gradients flow
                through it, so training can use it too.

        Returns:
            (fed tokens, d_model)
        """
        with self._installed():
            return self._run(embeddings, groups, keep, leading)

    def hidden_of_two(self, batches: Sequence[tuple[Tensor, Sequence[Group]]]) -> list[Tensor]:
        """``hidden`` of two batches at once, side by side, without gradients. For a CPU."""
        with self._installed():
            return side_by_side([partial(self._run, *batch, 0, False) for batch in batches])

    def _run(self, embeddings: Tensor, groups: Sequence[Group], keep: int, leading: bool) -> Tensor:
        positions = torch.cat([self._positions(g).repeat(g.count) for g in groups])
        self._now.positions = positions = positions.to(embeddings.device)
        self._now.groups, self._now.keep, self._now.leading = groups, keep, leading
        output = self.loaded.decoder(
            inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False
        )
        return output.last_hidden_state[0]

    def _positions(self, group: Group) -> Tensor:
        """(length,) the positions of one row's fed tokens."""
        return torch.arange(group.shared, group.shared + group.length)

    def _visible(self, group: Group, window: int | None) -> Tensor:
        """(length, shared + length) which tokens each fed token of one row sees."""
        fed = self._positions(group)
        seen = torch.cat([torch.arange(group.shared), fed])
        distance = fed[:, None] - seen
        return (distance >= 0) & (distance < (window or len(seen)))

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """Puts our attention function in place of the model's own for one forward pass."""
        config = self.loaded.config
        self._original = config._attn_implementation
        try:
            attentions()[NAME] = self._attend
            config._attn_implementation = NAME
            yield
        finally:
            config._attn_implementation = self._original
            del attentions()[NAME]

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """(1, heads, fed tokens, head dim) each -> (1, fed tokens, heads, head dim)."""
        own = self._own_attention(module)
        fold = query.shape[1] // key.shape[1] if own is grouped_sdpa else 1
        dtype = value.dtype
        if query.dtype != dtype or key.dtype != dtype:  # where rotary leaves two types
            # under a mask the CPU's bfloat16 attention is four times as slow as the float32 one
            one = torch.float32 if query.device.type == "cpu" else dtype
            query, key, value = query.to(one), key.to(one), value.to(one)
        parts, first = [], 0
        keeper = self._keeper.get(module, module)
        known = self._known.get(keeper)
        with torch.autocast(query.device.type, enabled=False):
            for group in self._now.groups:
                rows = slice(first, first + group.tokens)
                first += group.tokens
                q, k, v = (
                    x[0, :, rows].unflatten(1, (group.count, group.length)).transpose(0, 1)
                    for x in (query, key, value)
                )
                if group.shared:
                    assert known is not None
                    shared_k, shared_v = known
                    k = torch.cat(
                        [shared_k[:, :, : group.shared].expand(group.count, -1, -1, -1), k], 2
                    )
                    v = torch.cat(
                        [shared_v[:, :, : group.shared].expand(group.count, -1, -1, -1), v], 2
                    )
                if self._now.leading and first == group.tokens:
                    known = k, v
                if keep := self._now.keep:
                    self._known[keeper] = (k[:, :, :keep].detach(), v[:, :, :keep].detach())
                mask = self._mask(group, options.get("sliding_window"), fold, query)
                parts.append(own(module, q, k, v, mask, **options)[0].flatten(0, 1))
        return torch.cat(parts)[None].to(dtype), None

    def _own_attention(self, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
        """The attention function that the model uses without us."""
        if self._original == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward
        if self._original == "sdpa":
            return grouped_sdpa
        return attentions()[self._original]

    def _mask(self, group: Group, window: int | None, fold: int, like: Tensor) -> Tensor:
        """(1, 1, fold x length, shared + length): 0 where a fed token sees a token, -inf where it
        does not."""
        key = (group.shared, group.length, window, fold, like.dtype, like.device)
        mask = self._masks.get(key)
        if mask is None:
            if len(self._masks) >= MASKS:  # lengths that vary would fill the memory
                self._masks.clear()
            visible = self._visible(group, window).to(like.device)
            mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
            mask = mask.masked_fill(~visible, float("-inf")).repeat(fold, 1)[None, None]
            self._masks[key] = mask
        return mask
