"""HARC: couples harmful prompts with both directions, in weights (arXiv 2607.00572).

    L = L_prompt + L_response + 10 KL + CE

    L_prompt    mean over chosen layers of the hinges (``losses.coupling_loss``) at two positions:
                h at t_post_inst with v_ref, and h at t_inst with v_harm
    L_response  the same form on the mean of a reply's first 32 tokens, with v_ref_resp and
                v_harm_resp: harmful continuations against ordinary replies
    KL          KL(base || tuned) over ordinary replies, mean over tokens
    CE          cross-entropy of refusals to harmful requests

Steps:

1. On the base, estimate the four directions at every layer; v_harm_resp = n(continuation -
   ordinary), v_ref_resp = n(refusal - ordinary), as in the official code. Choose the layers with
   the highest Eq. 6.
2. A micro-batch is 6 harmful, 4 harmless and 2 pseudo-harmful requests.
3. Every so many micro-batches estimate the directions anew on the tuned model, and blend:
   v <- n(0.7 v_base + 0.3 v_now).

Directions point towards harmful and towards refused. They are constants: no gradient flows into
them. ``directions`` chooses controls in their place, at the same layers: ``permuted`` (the same
estimate, the labels of the classes dealt anew) and ``random`` (unit vectors, never estimated anew).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.registry import Speed
from core.records import HARMFUL, HARMLESS, PSEUDO_HARMFUL, stream_seed
from core.rows import Row
from core.settings import setting
from geometry.activations import RESPONSE_TOKENS
from geometry.contrasts import between, cosine, unit
from geometry.layers import eq6, inner_layers
from training.config import TrainConfig, published
from training.examples import Batches, Example
from training.forward import Pass
from training.losses import coupling_loss, kl_loss, reply_loss
from training.registry import ARMS, Arm, Bench, Losses, Method, update_cost

TERMS = ("full", "prompt", "response", "ce_kl", "ce")
POSITIONS = ("both", "t_inst", "t_post_inst")
DIRECTIONS = ("harc", "permuted", "random")


@dataclass(frozen=True)
class HARCConfig(TrainConfig):
    """The official code's. Its 400 micro-batches are 200 updates of two."""

    num_steps: int = published(TrainConfig, "num_steps", 200)
    accumulation: int = published(TrainConfig, "accumulation", 2)
    batch_size: int = published(TrainConfig, "batch_size", 6)
    learning_rate: float = published(TrainConfig, "learning_rate", 1e-4)
    schedule: str = published(TrainConfig, "schedule", "constant")
    warmup_steps: int = published(TrainConfig, "warmup_steps", 50)
    lora_rank: int = published(TrainConfig, "lora_rank", 32)
    lora_alpha: int = published(TrainConfig, "lora_alpha", 64)
    lora_dropout: float = published(TrainConfig, "lora_dropout", 0.0)
    all_linear: bool = published(TrainConfig, "all_linear", True)
    harmless: int = setting(4, "Harmless requests of a micro-batch (--batch-size: harmful).", low=1)
    pseudo_harmful: int = setting(2, "Pseudo-harmful requests of a micro-batch.", low=0)
    margin: float = setting(
        0.5, "Cosine that harmful states are pushed to (0.3 in the code).", low=0, high=1
    )
    layers: int = setting(2, "Layers, the best by Eq. 6 (later runs of the paper: 4).", low=1)
    coupling_weight: float = setting(1.0, "Of L_prompt and L_response.", low=0)
    kl_weight: float = setting(10.0, "Of the KL term.", low=0)
    reestimate_every: int = setting(200, "Micro-batches between estimates.", low=1)
    keep: float = setting(0.7, "Weight of the base's direction in the blend.", low=0, high=1)
    samples: int = setting(300, "Requests a class in an estimate, at most.", low=4)
    terms: str = setting("full", "Which terms: an ablation of the paper.", choices=TERMS)
    positions: str = setting("both", "Prompt positions that are coupled.", choices=POSITIONS)
    directions: str = setting("harc", "Its directions, or a control's.", choices=DIRECTIONS)
    opened: bool = setting(False, "Hold ordinary replies that open as harmful ones do too.")


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


def method(bench: Bench, config: HARCConfig) -> Method:
    return _HARC(bench, config).method


class _HARC:
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


def cost(config: HARCConfig, speed: Speed) -> float:
    """Refusals and continuations of as many harmful requests, and ordinary ones beside the base."""
    ordinary = config.harmless + config.pseudo_harmful
    learnt = 2 * config.batch_size + ordinary
    return update_cost(config, speed, learnt=learnt, frozen=ordinary)


ARM = ARMS.add(
    Arm(
        name="harc",
        summary="Couple harmful prompts with harmfulness and refusal directions (HARC).",
        config=HARCConfig,
        method=method,
        needs=(HARMFUL, HARMLESS, PSEUDO_HARMFUL),
        cost=cost,
        source="arXiv 2607.00572 and its official code",
        small={
            "batch_size": 4,
            "harmless": 3,
            "pseudo_harmful": 1,
            "accumulation": 1,
            "learning_rate": 1e-3,
            "coupling_weight": 20.0,
            "reestimate_every": 50,
        },
        examples=(
            "train harc --out runs/harc --preset small",
            "train harc --out runs/harc-permuted --preset small --directions permuted",
        ),
    )
)
