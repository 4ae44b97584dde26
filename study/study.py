"""One model in front of the contrast set: fields, carriers, and what was measured on it.

What takes long is kept in the run folder under a hash of all it depends on, so that a command goes
on where it was stopped and several commands share it. Replies under refusal ablation stay in the
run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from core.errors import AttackPlaneError
from core.generate import first_turn
from core.kept import Kept
from core.models import LoadedModel, ModelHandle
from core.prompt import Conversation, Prompt, Renderer
from core.readings import Directions
from core.records import HARMFUL, HARMLESS, AttackArtifact, Behaviour
from core.rows import Row
from core.store import RunFolder
from evaluation.behaviours import load_behaviours, spread
from evaluation.judges import Exchange, Judge, make_judge, outcomes
from evaluation.refusal_score import Openings, openings_of
from geometry.activations import POSITIONS as DIRECTION_POSITIONS
from geometry.activations import collect
from geometry.attribution import Texts
from geometry.carriers import (
    KEPT,
    SCORES,
    Carrier,
    Tried,
    best_of_each,
    candidates,
    scored,
    searched_layers,
)
from geometry.contrasts import SMALLEST_CLASS, Contrast, centred_by, indices
from geometry.directions import best_layers, refused_and_accepted
from pipeline.contrast_reading import TEMPLATES, ContrastReading
from pipeline.directions import begun_otherwise, directions_of, estimated
from study.config import StudyConfig

MEASURED = "measured.jsonl"
TAIL = ("-5", "-4", "-3", "-2", "-1")
POSITIONS = ("t_first", *DIRECTION_POSITIONS, *TAIL)
ESTIMATORS = ("auto", "harc", "zhao")
KINDS = ("H", "R")
"""The two fields."""
Request = Behaviour | AttackArtifact


class Study:
    """A model and what was measured on it, lazily. Use within the run's lock."""

    def __init__(self, run: RunFolder, model: ModelHandle, config: StudyConfig) -> None:
        self.run, self.model, self.spec, self.config = run, model, model.spec, config
        self.reading = ContrastReading(run, model, config.directions, positions=POSITIONS)
        self.behaviours, self.harmful = self.reading.behaviours, self.reading.harmful
        self._carriers: dict[str, Carrier] = {}
        self._searched: dict[str, Row] = {}
        self._kept = Kept(run, MEASURED)

    @property
    def loaded(self) -> LoadedModel:
        return self.reading.loaded

    @property
    def renderer(self) -> Renderer:
        return self.reading.renderer

    # --- what is kept -----------------------------------------------------------------------------
    def kept(self, what: str, depends: Any, make: Callable[[], Any]) -> Any:
        """``make()`` as JSON, from the run where the same was made before."""
        return self._kept.get(what, self.model, depends, make)

    @property
    def set_identity(self) -> list[Any]:
        """Stands for the contrast set and what was said to it."""
        requests = [(b.request, b.label, b.unit, b.category) for b in self.behaviours]
        told = [self.config.system_prompt, *self.unusual_template]
        return [*told, self.config.reply_tokens, requests]

    @property
    def unusual_template(self) -> list[str]:
        """The template, where it is not the model's chat template."""
        return [self.config.template] if self.config.template != TEMPLATES[0] else []

    # --- prompts and replies ----------------------------------------------------------------------
    def held_out(self, label: str) -> list[Behaviour]:
        """Behaviours that no direction was estimated on.

        Raises:
            AttackPlaneError: none has this label, or some are contrast prompts.
        """
        source, splits = self.config.held_out, self.config.held_out_splits
        behaviours = load_behaviours(source, label=label, splits=splits)
        behaviours = spread(behaviours, self.config.held_out_prompts)
        both = {b.request for b in behaviours} & {b.request for b in self.behaviours}
        if both:
            raise AttackPlaneError(
                "held-out prompts are among those that directions are estimated on",
                where=source,
                got=sorted(both)[0],
                remedy="give other splits or another file",
            )
        return behaviours

    def held_out_pairs(self, limit: int | None = None) -> list[tuple[Behaviour, Behaviour]]:
        """Harmful and harmless held-out requests that are matched; in their order if none is.

        ``limit``: so many at most, spread over categories.
        """
        harmful, harmless = spread(self.held_out(HARMFUL), limit), self.held_out(HARMLESS)
        of = {b.unit: b for b in harmless}
        return [(b, of[b.unit]) for b in harmful if b.unit in of] or list(
            zip(harmful, harmless, strict=False)
        )

    @property
    def prompts(self) -> list[Prompt]:
        return self.reading.prompts

    @property
    def replies(self) -> list[str]:
        return self.reading.replies

    @property
    def refused(self) -> list[bool | None]:
        return self.reading.refused

    @cached_property
    def judge(self) -> Judge:
        return make_judge(self.config.judge)

    def outcomes(self, replies: Iterable[tuple[Request, str]]) -> list[str | None]:
        """What the judge says of (behaviour or artifact, reply) pairs.

        ``refused``, ``complied``, ``neither``, or None where it cannot say.
        """
        exchanges = [
            Exchange(of.request, reply, of.target_string, getattr(of, "prompt", None))
            for of, reply in replies
        ]
        return outcomes(self.judge, exchanges)

    @property
    def refusal_rate(self) -> float:
        """Share of harmful contrast prompts that the model refuses by itself."""
        refused, judged = self.reading.refusals(harmful=True)
        return refused / max(1, judged)

    @cached_property
    def openings(self) -> Openings:
        """Texts of outcome D as this model writes them."""
        return openings_of(self.renderer)

    @cached_property
    def directions(self) -> Directions:
        """The run's harc directions of this model; they are estimated where it has none.

        A run whose directions were made from something else keeps them; then ours are not saved.
        """
        if begun_otherwise(self.reading, "harc"):
            return estimated(self.reading, "harc")
        return directions_of(self.reading, ("harc",)).directions[0]

    # --- contrasts --------------------------------------------------------------------------------
    @cached_property
    def estimator(self) -> str:
        """Of the refusal contrast. Only where it may be zhao are the model's replies made."""
        if self.config.estimator == "harc":
            return "harc"
        enough = min(map(len, refused_and_accepted(self.refused))) >= SMALLEST_CLASS
        if self.config.estimator == "zhao" and not enough:
            raise AttackPlaneError(
                "too few replies for the zhao estimator",
                where=self.spec,
                got=(
                    f"{sum(r is True for r in self.refused)} refused, "
                    f"{sum(r is False for r in self.refused)} accepted"
                ),
                remedy="use the estimator harc",
            )
        return "zhao" if enough else "harc"

    @property
    def estimator_identity(self) -> list[Any]:
        """The estimator, and for zhao who refused, which depends on the judge."""
        return [self.estimator, self.refused if self.estimator == "zhao" else None]

    @property
    def refusal_kind(self) -> str:
        """The kind of ``contrast`` that the estimator takes for refusal."""
        return "harm" if self.estimator == "harc" else "refusal"

    def contrast(self, kind: str, position: str) -> Contrast:
        """The contrast of a kind at a position.

        ``harm`` is harmful against harmless prompts, ``refusal`` is refused against accepted ones,
        ``within`` the same within harmful and within harmless prompts: what harm alone changes is
        no part of it (``centred_by``).
        """
        sides = (
            (indices(self.harmful), indices(not h for h in self.harmful))
            if kind == "harm"
            else refused_and_accepted(self.refused)
        )
        units = tuple(b.unit for b in self.behaviours)
        resid = self.reading.activations.at(position)
        if kind == "within":
            resid = centred_by(resid, self.harmful)
        return Contrast(f"{kind} at {position}", resid, *sides, units)

    @property
    def positions(self) -> tuple[str, ...]:
        """Where contrasts are read: t_post_inst is -1."""
        return tuple(p for p in self.reading.activations.positions if p != "t_post_inst")

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

    def apart(self, position: str = "-1") -> Contrast:
        """Refused against accepted within harmful and within harmless prompts.

        Where the zhao estimator has too few prompts, harmful against harmless ones.
        """
        return self.contrast("within" if self.refusal_kind == "refusal" else "harm", position)

    @property
    def layer(self) -> int:
        """The best inner layer by ``eq6_prompt`` of the run's harc directions: prompts decide."""
        return best_layers(self.directions)[0]

    @property
    def prompt_score(self) -> torch.Tensor:
        """(layer,) ``eq6_prompt``."""
        return self.directions.statistics["layer_score"]

    # --- carriers ---------------------------------------------------------------------------------
    def field(self, kind: str) -> dict[str, Contrast]:
        """Contrasts that carriers are looked for in.

        H is looked for at t_inst, R at the template's tokens by this study's estimator.
        """
        if kind == "H":
            return {"t_inst": self.harmfulness}
        return {p: self.contrast(self.refusal_kind, p) for p in self.tail}

    def carrier(self, kind: str) -> Carrier:
        """The best admissible carrier of a field, with its full scores; see ``admissible``.

        Its vector is made anew from the residuals.
        """
        if kind not in self._carriers:
            self._carriers[kind] = self._found(kind)
        return self._carriers[kind]

    def some(self, harmful: bool, n: int) -> list[Prompt]:
        """``n`` contrast prompts of one label, spread over categories."""
        of = {b.behaviour_id: p for b, p in zip(self.behaviours, self.prompts, strict=True)}
        label = [b for b, h in zip(self.behaviours, self.harmful, strict=True) if h is harmful]
        return [of[b.behaviour_id] for b in spread(label, n)]

    @property
    def tried(self) -> Tried:
        """What candidates are tried on: contrast prompts, spread over categories."""
        n = self.config.carrier_prompts
        sides = self.some(True, n), self.some(False, n)
        return Tried(*sides, self.carrier_texts, self.config.outputs)

    @property
    def carrier_texts(self) -> Texts:
        """The texts of outcome D that carriers are scored on: a trained and an untrained refusal.

        Their effects, and those of their controls, are measured on others.
        """
        chosen = self.openings.every_other(0, self.config.refusals)
        return Texts(chosen.refusals, chosen.compliances)

    def candidates(self, kind: str) -> list[Carrier]:
        """Candidates of one field: about as many for H as for R.

        R is looked for at several positions. H has one, and every layer there is tried.
        """
        field = self.field(kind)
        every = self.config.carrier_every if len(field) > 1 else 1
        return candidates(field, searched_layers(self.loaded.n_layers, every))

    @property
    def how(self) -> list[str]:
        """How ablations are made, where it is not the usual way."""
        return ["outputs"] if self.config.outputs else []

    def search_identity(self, kind: str) -> list[Any]:
        """What a search for carriers depends on."""
        sizes = [self.config.carrier_prompts, self.config.carrier_every, KEPT]
        whose = [*self.set_identity, kind, self.estimator_identity]
        return [*whose, *sizes, self.carrier_texts, *self.how]

    def _found(self, kind: str) -> Carrier:
        tried = self.candidates(kind)

        def make() -> Row:
            if kind not in self._searched:  # both fields at once: they share all passes
                fields = [self.candidates(k) for k in KINDS]
                best = best_of_each(self.loaded, fields, self.tried)
                both = scored(self.loaded, best, self.tried)
                self._searched = {k: c.to_row() for k, c in zip(KINDS, both, strict=True)}
            return self._searched[kind]

        row = self.kept("carrier", self.search_identity(kind), make)
        by_place = {(c.position, c.layer): c for c in tried}
        scores = {name: row[name] for name in SCORES}
        return replace(by_place[row["position"], row["layer"]], **scores)

    def place(self, carrier: Carrier) -> list[Any]:
        """What a carrier's vector depends on besides the contrast set."""
        return [carrier.position, carrier.layer, self.estimator_identity]

    def text(self, ids: Sequence[int]) -> str:
        text = self.loaded.tokenizer.decode(list(ids), skip_special_tokens=True)
        return (text if self.loaded.has_chat_template else first_turn(text)).strip()

    def prompts_of(self, contents: Sequence[tuple[str, str | None]]) -> list[Prompt]:
        """(user content, system prompt) pairs, rendered."""
        render = self.renderer.render
        return [render(Conversation(c, system=s), allow_trim=True) for c, s in contents]

    def residuals(self, prompts: Sequence[Prompt], position: str = "t_inst") -> torch.Tensor:
        """(prompt, layer, d_model) at one position."""
        ids = [str(i) for i in range(len(prompts))]
        return collect(self.loaded, prompts, ids, positions=(position,)).at(position)
