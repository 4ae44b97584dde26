"""How HARC learns: its directions and its losses. ``training/harc.py`` says what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.records import HARMLESS, PSEUDO_HARMFUL, stream_seed
from core.rows import Row
from geometry.activations import RESPONSE_TOKENS
from geometry.contrasts import between, cosine, unit
from geometry.layers import eq6, inner_layers
from training.examples import Batches, Example
from training.forward import Pass
from training.harc import DIRECTIONS, HARCConfig
from training.losses import coupling_loss, kl_loss, reply_loss
from training.registry import Bench, Losses, Method


@dataclass(frozen=True)
class Four:
    """Unit directions by layer, (layer, d_model) each."""

    harm: Tensor
    refusal: Tensor
    harm_response: Tensor
    refusal_response: Tensor

    def blended(self, now: Four, keep: float) -> Four:
        pairs = zip(vars(self).values(), vars(now).values(), strict=True)
        return Four(*(unit(keep * base + (1 - keep) * new) for base, new in pairs))


class HARC:
    def __init__(self, bench: Bench, config: HARCConfig) -> None:
        self.bench, self.config = bench, config
        self.refusals, self.continuations = bench.texts.refusals(), bench.texts.continuations()
        self.harmless = bench.texts.ordinary(HARMLESS, opened=config.opened)
        pseudo = bench.texts.ordinary(PSEUDO_HARMFUL, opened=config.opened)
        size, seed = config.batch_size, config.seed
        self.batches: list[Batches] = [
            Batches(self.refusals, size, seed),
            Batches(self.continuations, size, seed),
            Batches(self.harmless, config.harmless, seed + 1),
        ]
        if pseudo and config.pseudo_harmful:
            self.batches.append(Batches(pseudo, config.pseudo_harmful, seed + 2))
        n_layers = bench.adapted.loaded.n_layers
        every = range(n_layers + 1)
        with bench.adapted.off():
            real = self.estimate(every, DIRECTIONS[0])
            self.base = real if config.directions == DIRECTIONS[0] else self.estimate(every)
        self.layers = self.chosen_layers(real, n_layers)  # a control is read at the same layers
        self.now = self.base
        self.method = Method(self.losses, self.after_update, self.state, self.restore)

    # --- directions -------------------------------------------------------------------------------
    def estimate(self, layers: Sequence[int], kind: str | None = None) -> Four:
        """The four directions on the model as it is; zeros at layers that are not asked for.

        ``kind`` is one of ``DIRECTIONS``; None takes the config's.
        """
        kind = kind or self.config.directions
        generator = torch.Generator().manual_seed(stream_seed(self.config.seed, "harc"))
        d, n = self.bench.adapted.loaded.d_model, self.bench.adapted.loaded.n_layers + 1
        if kind == "random":
            return Four(*unit(torch.randn(4, n, d, generator=generator)))
        count = self.config.samples
        refusals, continuations, ordinary = (
            self._states(rows[:count], layers)
            for rows in (self.refusals, self.continuations, self.harmless)
        )
        # states are (t_inst, t_post_inst, response) of one class of requests
        pairs = [
            (refusals[0], ordinary[0]),
            (refusals[1], ordinary[1]),
            (continuations[2], ordinary[2]),
            (refusals[2], ordinary[2]),
        ]
        if kind == "permuted":
            pairs = [dealt_anew(*pair, self.config.seed) for pair in pairs]
        found = torch.zeros(4, n, d)
        for k, (positive, negative) in enumerate(pairs):
            found[k, list(layers)] = between(positive, negative).direction
        return Four(*found)

    def _states(self, rows: Sequence[Example], layers: Sequence[int]) -> list[Tensor]:
        """(row, layer, d_model) at t_inst, at t_post_inst, and over the reply."""
        spans = [
            [range(row.t_inst, row.t_inst + 1) for row in rows],
            [range(row.t_post_inst, row.reply_start) for row in rows],
            [row.reply[:RESPONSE_TOKENS] for row in rows],
        ]
        return self.bench.forward.means(rows, layers, spans)

    def chosen_layers(self, directions: Four, n_layers: int) -> list[int]:
        scores = eq6(*vars(directions).values())
        inner = list(inner_layers(n_layers))
        best = scores[inner].topk(min(self.config.layers, len(inner))).indices
        return sorted(inner[int(i)] for i in best)

    # --- losses -----------------------------------------------------------------------------------
    def losses(self, micro: int) -> Iterator[Losses]:
        terms, config = self.config.terms, self.config
        parts = [batch(micro) for batch in self.batches]
        if terms not in ("full", "response"):
            parts[1] = []
        sizes = [len(parts[0]), len(parts[1]), sum(map(len, parts[2:]))]
        rows = [example for part in parts for example in part]
        refused, continued, ordinary = _ranges(sizes)
        with self.bench.clock.time("forward"):
            out = self.bench.forward(rows, self.layers if terms not in ("ce", "ce_kl") else ())
            losses = {"ce": reply_loss(*out.logits(refused))}
            if terms in ("full", "prompt"):
                coupled = self._prompt(out, [*refused, *ordinary], len(refused))
                losses["prompt"] = config.coupling_weight * coupled
            if terms in ("full", "response"):
                coupled = self._response(out, [*continued, *ordinary], len(continued))
                losses["response"] = config.coupling_weight * coupled
            if terms != "ce" and config.kl_weight:
                logits, labels = out.logits(ordinary)
                with self.bench.adapted.off():
                    base, _ = self.bench.forward([rows[i] for i in ordinary]).logits()
                losses["kl"] = config.kl_weight * kl_loss(base, logits, labels)
        yield losses

    def _prompt(self, out: Pass, rows: Sequence[int], harmful: int) -> Tensor:
        """L_prompt: the first ``harmful`` rows are harmful, the others benign."""
        label = torch.arange(len(rows), device=out.weight.device) < harmful
        total = torch.zeros((), device=out.weight.device)
        for layer in self.layers:
            for position, direction in (
                ("t_inst", self.now.harm),
                ("t_post_inst", self.now.refusal),
            ):
                if self.config.positions in ("both", position):
                    tokens = [getattr(out.rows[i], position) for i in rows]
                    states = out.residual(layer, rows, tokens)
                    along = direction[layer].to(states.device)
                    total = total + coupling_loss(states, along, label, self.config.margin)
        return total / len(self.layers)

    def _response(self, out: Pass, rows: Sequence[int], harmful: int) -> Tensor:
        """L_response: the first ``harmful`` rows are continuations, the others ordinary."""
        label = torch.arange(len(rows), device=out.weight.device) < harmful
        total = torch.zeros((), device=out.weight.device)
        for layer in self.layers:
            states = out.response(layer, rows)
            for direction in (self.now.harm_response, self.now.refusal_response):
                along = direction[layer].to(states.device)
                total = total + coupling_loss(states, along, label, self.config.margin)
        return total / len(self.layers)

    def after_update(self, updates: int) -> Mapping[str, float]:
        every = max(1, self.config.reestimate_every // self.config.accumulation)
        coupled = self.config.terms not in ("ce", "ce_kl")
        if coupled and updates % every == 0 and self.config.directions != "random":
            with self.bench.clock.time("estimate"), self.bench.adapted.merged():
                now = self.estimate(self.layers)
            self.now = self.base.blended(now, self.config.keep)
        kept = [(a[self.layers], b[self.layers]) for a, b in self._pairs()]
        return {"drift": float(torch.cat([1 - cosine(a, b) for a, b in kept]).mean())}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(vars(self.base).values(), vars(self.now).values(), strict=True))

    def state(self) -> Row:
        return {"base": vars(self.base), "now": vars(self.now), "layers": self.layers}

    def restore(self, row: Row) -> None:
        self.base, self.now = Four(**row["base"]), Four(**row["now"])
        self.layers = row["layers"]


def dealt_anew(positive: Tensor, negative: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The rows of two classes with their labels dealt anew, always in the same way."""
    both = torch.cat([positive, negative])
    generator = torch.Generator().manual_seed(stream_seed(seed, "permuted"))
    order = torch.randperm(len(both), generator=generator)
    return both[order[: len(positive)]], both[order[len(positive) :]]


def _ranges(sizes: Sequence[int]) -> list[range]:
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
