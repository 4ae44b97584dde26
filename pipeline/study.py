"""One model in front of the contrast set: residuals, own replies, fields, carriers, response side, interventions.

What takes long is kept in the run folder under a hash of all it depends on, so that a command goes on where it was stopped
and several commands share it. Replies under refusal ablation stay in the run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import evaluation
from core.errors import AttackPlaneError
from core.prompt import Conversation, Prompt, Renderer
from core.records import Behaviour, content_hash
from core.store import RunFolder
from evaluation.behaviours import load_behaviours
from geometry.activations import collect
from geometry.carriers import Carrier, candidates, screened
from geometry.contrasts import Contrast
from geometry.directions import (
    SMALLEST_CLASS,
    held_out_separation,
    indices,
    layer_score,
    refused_and_accepted,
)
from pipeline.common import opened
from pipeline.directions import DirectionsConfig, contrast_replies, contrast_set, rendered, verdicts

MEASURED = "measured.jsonl"
TAIL = ("-5", "-4", "-3", "-2", "-1")
POSITIONS = ("t_first", "t_goal", "t_inst", *TAIL)
ESTIMATORS = ("auto", "harc", "zhao")


@dataclass(frozen=True)
class StudyConfig:
    """``estimator`` of the refusal contrast: auto is zhao where the model refuses and accepts enough, else harc.

    ``carrier_prompts`` of each label, and every ``carrier_every``-th layer, are tried for carriers; ``refusals``: how many texts the
    log-probability of a refusal is a mean over; ``controls``: random directions of each kind.
    """

    contrast: str = "demonstration"
    splits: tuple[str, ...] = ("train", "validation")
    held_out: str = "demonstration"
    held_out_splits: tuple[str, ...] = ("test",)
    estimator: str = "auto"
    reply_tokens: int = 32
    resamples: int = 200
    controls: int = 5
    carrier_prompts: int = 12
    carrier_every: int = 3
    refusals: int = 2
    seed: int = 0
    system_prompt: str | None = None

    @property
    def directions(self) -> DirectionsConfig:
        return DirectionsConfig(
            self.contrast, self.splits, self.reply_tokens, self.resamples, self.seed, self.system_prompt
        )


def refusal_texts(n: int) -> list[str]:
    """First sentences of our refusals."""
    text = (Path(str(evaluation.__file__)).parent / "data" / "refusals.txt").read_text()
    return [line.partition(".")[0] + "." for line in text.strip().splitlines()[:n]]


class Study:
    """``loaded`` and what was measured on it, lazily. Use within the run's lock."""

    def __init__(self, run: RunFolder, spec: str, config: StudyConfig) -> None:
        self.run, self.spec, self.config = run, spec, config
        self.loaded = opened(spec)
        self.renderer = Renderer(self.loaded)
        self.behaviours = contrast_set(config.directions)
        self.harmful = [b.label == "harmful" for b in self.behaviours]
        self._carriers: dict[str, list[Carrier]] = {}
        self._known = {row["key"]: row["value"] for row in run.rows(MEASURED)}

    # --- what is kept ---------------------------------------------------------------------------------------------
    def kept(self, what: str, depends: Any, make: Callable[[], Any]) -> Any:
        """``make()`` as JSON, from the run where the same was made before."""
        key = content_hash([what, self.loaded.fingerprint, depends])
        if key not in self._known:
            self._known[key] = make()
            row = {"key": key, "what": what, "model": self.spec, "value": self._known[key]}
            self.run.append(MEASURED, row)
        return self._known[key]

    @property
    def set_identity(self) -> list[Any]:
        requests = [(b.request, b.label) for b in self.behaviours]
        return [self.config.system_prompt, self.config.reply_tokens, requests]

    # --- prompts and replies --------------------------------------------------------------------------------------
    def held_out(self, label: str) -> list[Behaviour]:
        """Behaviours that no direction was estimated on.

        Raises:
            AttackPlaneError: none has this label, or some are contrast prompts.
        """
        found = load_behaviours(self.config.held_out, label=label, splits=self.config.held_out_splits)
        both = {b.request for b in found} & {b.request for b in self.behaviours}
        if both:
            raise AttackPlaneError(
                "held-out prompts are among those that directions are estimated on",
                where=self.config.held_out,
                got=sorted(both)[0],
                remedy="give other splits or another file",
            )
        return found

    @cached_property
    def prompts(self) -> list[Prompt]:
        return rendered(self.renderer, self.behaviours, self.config.system_prompt)

    @cached_property
    def replies(self) -> list[str]:
        return contrast_replies(self.run, self.renderer, self.behaviours, self.config.directions)

    @cached_property
    def refused(self) -> list[bool | None]:
        return verdicts(self.replies)

    @property
    def refusal_rate(self) -> float:
        """Share of harmful contrast prompts that the model refuses by itself."""
        judged = [r for r, h in zip(self.refused, self.harmful, strict=True) if h and r is not None]
        return sum(judged) / max(1, len(judged))

    @cached_property
    def refusal_ids(self) -> list[tuple[int, ...]]:
        conversation = Conversation.build(self.behaviours[0].request, system=self.config.system_prompt)
        texts = refusal_texts(self.config.refusals)
        return [self.renderer.render(conversation, target=text).target_ids for text in texts]

    # --- contrasts ------------------------------------------------------------------------------------------------
    @cached_property
    def estimator(self) -> str:
        """Of the refusal contrast."""
        enough = min(map(len, refused_and_accepted(self.refused))) >= SMALLEST_CLASS
        if self.config.estimator == "zhao" and not enough:
            raise AttackPlaneError(
                "too few replies for the zhao estimator",
                where=self.spec,
                got=f"{sum(r is True for r in self.refused)} refused, {sum(r is False for r in self.refused)} accepted",
                remedy="use --estimator harc",
            )
        if self.config.estimator != "auto":
            return self.config.estimator
        return "zhao" if enough else "harc"

    @property
    def refusal_kind(self) -> str:
        """The kind of ``contrast`` that the estimator takes for refusal."""
        return "harm" if self.estimator == "harc" else "refusal"

    @cached_property
    def _activations(self) -> Any:
        present = [
            p for p in POSITIONS if not p.startswith("-") or int(p) >= -min(len(q.ids) for q in self.prompts)
        ]
        return collect(
            self.loaded, self.prompts, [b.behaviour_id for b in self.behaviours], positions=present,
            description="contrast prompts",
        )  # fmt: skip

    def contrast(self, kind: str, position: str) -> Contrast:
        """``harm``: harmful against harmless prompts at a position; ``refusal``: refused against accepted ones."""
        sides = (
            (indices(self.harmful), indices(not h for h in self.harmful))
            if kind == "harm"
            else refused_and_accepted(self.refused)
        )
        units = tuple(b.behaviour_id for b in self.behaviours)
        return Contrast(f"{kind} at {position}", self._activations.at(position), *sides, units)

    @property
    def positions(self) -> tuple[str, ...]:
        return self._activations.positions

    @property
    def tail(self) -> list[str]:
        """Of -5..-1 those that stand after the user content in every prompt."""
        return [p for p in TAIL if all(int(p) >= -len(q.tail) for q in self.prompts)] or ["-1"]

    @cached_property
    def harmfulness(self) -> Contrast:
        return self.contrast("harm", "t_inst")

    @cached_property
    def refusal(self) -> Contrast:
        """The refusal contrast at t_post_inst by this study's estimator."""
        return self.contrast(self.refusal_kind, "-1")

    @cached_property
    def layer(self) -> int:
        """The best inner layer by ``eq6_prompt`` of HARC's two directions: prompts alone decide, no reply or intervention."""
        return int(self.prompt_score.nan_to_num(-torch.inf).argmax())

    @cached_property
    def prompt_score(self) -> torch.Tensor:
        """(layer,) ``eq6_prompt``."""
        h, r = self.harmfulness, self.contrast("harm", "-1")
        separation = [held_out_separation(c.resid, c.positive, c.negative) * c.alive for c in (h, r)]
        return layer_score((h.direction * r.direction).sum(-1), *separation)

    # --- carriers -------------------------------------------------------------------------------------------------
    def field(self, kind: str) -> dict[str, Contrast]:
        """Contrasts that carriers are looked for in: H at t_inst, R at the template's tokens by this study's estimator."""
        if kind == "H":
            return {"t_inst": self.harmfulness}
        return {p: self.contrast(self.refusal_kind, p) for p in self.tail}

    def carriers(self, kind: str) -> list[Carrier]:
        """Scored candidates of one field, best first; their vectors are made anew from the residuals."""
        if kind not in self._carriers:
            self._carriers[kind] = self._scored(kind)
        return self._carriers[kind]

    def _scored(self, kind: str) -> list[Carrier]:
        field, n = self.field(kind), self.config.carrier_prompts
        found = candidates(field, self.loaded.n_layers, self.config.carrier_every)

        def make() -> list[dict[str, Any]]:
            harmful = [p for p, h in zip(self.prompts, self.harmful, strict=True) if h][:n]
            harmless = [p for p, h in zip(self.prompts, self.harmful, strict=True) if not h][:n]
            return [c.to_row() for c in screened(self.loaded, found, harmful, harmless, self.refusal_ids)]

        every = self.config.carrier_every
        depends = [*self.set_identity, kind, self.estimator, n, every, self.refusal_ids]
        by_place = {(c.position, c.layer): c for c in found}
        return [
            replace(
                by_place[row["position"], row["layer"]],
                **{name: row[name] for name in ("comply", "refuse", "kl")},
            )
            for row in self.kept("carriers", depends, make)
        ]

    def carrier(self, kind: str) -> Carrier:
        """The best admissible carrier of a field, else the one with the lowest KL (``admissible`` says which)."""
        return self.carriers(kind)[0]

    def place(self, carrier: Carrier) -> list[Any]:
        """What a carrier's vector depends on besides the contrast set."""
        return [carrier.position, carrier.layer, self.estimator]

    def text(self, ids: Sequence[int]) -> str:
        return self.loaded.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def prompts_of(self, contents: Sequence[tuple[str, str | None]]) -> list[Prompt]:
        """(user content, system prompt) pairs, rendered."""
        return [self.renderer.render(Conversation(c, system=s), allow_trim=True) for c, s in contents]

    def residuals(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(prompt, layer, d_model) at t_inst."""
        return collect(self.loaded, prompts, [str(i) for i in range(len(prompts))], positions=("t_inst",)).at(
            "t_inst"
        )
