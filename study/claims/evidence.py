"""What claims are measured on: one studied model, its attacked prompts and its place on the plane.

What several claims need is made once: interventions and their controls on held-out prompts, the
response side, what the model does when it is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from core.errors import NothingToMeasure
from core.readings import PlanePoint
from core.records import BASELINES, HARMFUL, HARMLESS, AttackArtifact, Replay
from core.rows import Row
from evaluation.behaviours import spread
from evaluation.judges import REFUSED
from geometry.carriers import Carrier
from geometry.contrasts import SMALLEST_CLASS
from geometry.controls import edit
from geometry.effects import by_behaviour, differences, pick
from geometry.interventions import Intervention, ablation, matched_along, steering
from geometry.layers import MAX_KL
from geometry.plane import plain_requests
from pipeline.plane import PlaneReading
from study.outcomes import measure, site_of
from study.replies import Responses, replies_to, responses
from study.searched import KINDS, searched
from study.study import Study
from study.wrapped import Wrapped, wrapped

REPLY_TOKENS = 32
"""Of replies under interventions: enough for a refusal or the beginning of an answer to show."""
NATS = "nats per token"
CONTROLS = 199
"""Directions that mean nothing, of each kind: p is at least 0.005, which Holm's correction for nine
claims leaves below 0.05."""
CONTROL_PROMPTS = 12
"""Held-out prompts of a label on which controls are run: what takes most of the time."""
CONTROL_TEXTS = 2
"""Refusals, and openings that comply, in outcome D of controls and of what is ranked among them.
Carriers were not chosen on these."""
REFUSED_SHARE = 0.5
"""Share of held-out harmful prompts that a model must refuse by itself before it is aligned."""
REFUSED_COUNT = 5
"""How many it must refuse before it can be reopened."""
MODES = ("H", "R", "R-H")


@dataclass(frozen=True)
class Evidence:
    """What a claim may look at.

    ``artifacts``, ``replays`` and ``points`` (own frame) are of behaviours that no direction was
    estimated on, and ``reading`` what the plane has read. They are there for claims that need
    attacks. ``controls``: directions that mean
    nothing, of each kind.
    """

    study: Study
    controls: int = CONTROLS
    artifacts: Sequence[AttackArtifact] = ()
    replays: Sequence[Replay] = ()
    points: Sequence[PlanePoint] = ()
    reading: PlaneReading | None = None

    # --- interventions on held-out prompts --------------------------------------------------------
    @cached_property
    def ablations(self) -> list[Row]:
        """Outcome rows of every mode ablated at all layers, on held-out harmful prompts."""
        return self._ablated(HARMFUL, REPLY_TOKENS)

    @cached_property
    def ablations_of_safe(self) -> list[Row]:
        """The same on held-out harmless prompts, without replies: what an ablation disturbs."""
        return self._ablated(HARMLESS, 0)

    def _ablated(self, label: str, tokens: int) -> list[Row]:
        site, made_from = site_of(self.study, None)
        edits = [edit(mode, "ablate", 1.0, site.vectors, site.layers, site) for mode in MODES]
        return measure(self.study, edits, self.study.held_out(label), tokens, made_from)

    def ablated_controls(self, mode: str, kinds: Sequence[str] = KINDS) -> list[Row]:
        """Outcome D of the controls of one carrier's ablation, beside its own and the model alone.

        On ``CONTROL_PROMPTS`` held-out harmful prompts; D is of ``CONTROL_TEXTS`` openings each.
        Kind ``matched``: searched random directions, moved as far as the carrier moves. Kind
        ``permuted``: searched directions of permuted labels, ablated as they are.
        """
        site, made_from = site_of(self.study, None)
        own = edit(mode, "ablate", 1.0, site.vectors, site.layers, site)
        edits = [own]
        if "matched" in kinds:
            along = [c.vector[None] for c in self._searched(mode, "matched")]
            edits += matched_along(own, along)
        if "permuted" in kinds:
            for draw, c in enumerate(self._searched(mode, "permuted")):
                other = ablation(mode, c.vector[None], site.layers, outputs=site.outputs)
                edits.append(replace(other, kind="permuted", draw=draw))
        return self._without_replies(HARMFUL, edits, made_from)

    def _without_replies(self, label: str, edits: list[Intervention], made_from: Any) -> list[Row]:
        behaviours = spread(self.study.held_out(label), CONTROL_PROMPTS)
        texts = self.study.openings.every_other(1, CONTROL_TEXTS)
        made_from = [made_from, self.controls]
        return measure(self.study, edits, behaviours, 0, made_from, texts)

    @cached_property
    def additions(self) -> list[Row]:
        """Outcome D with refusal added to held-out harmless prompts, with controls of both kinds.

        On ``CONTROL_PROMPTS`` of them. Controls are added at their own layers, at the length of
        the carrier.
        """
        site, made_from = site_of(self.study, None, operation="steer")
        own = edit("R", "steer", 1.0, site.vectors, site.layers, site)
        edits: list[Intervention] = [own]
        for kind in KINDS:
            for draw, c in enumerate(self._searched("R", kind)):
                other = steering("R", c.vector, [c.layer], site.length)
                edits.append(replace(other, kind=kind, draw=draw, strength=1.0))
        return self._without_replies(HARMLESS, edits, made_from)

    @cached_property
    def _found(self) -> dict[tuple[str, str], list[Carrier]]:
        return {}

    def _searched(self, carrier: str, kind: str) -> list[Carrier]:
        if (carrier, kind) not in self._found:
            self._found[carrier, kind] = searched(self.study, carrier, kind, self.controls)
        return self._found[carrier, kind]

    # --- what the model does by itself ------------------------------------------------------------
    @cached_property
    def responses(self) -> Responses:
        """Response-side contrasts.

        Raises:
            NothingToMeasure: too few replies of a kind.
        """
        return responses(self.study)

    @cached_property
    def wrapped(self) -> Wrapped:
        """The attacked prompts beside the same wrappers with harmless requests in them.

        Raises:
            NothingToMeasure: none has a counterpart.
        """
        if self.reading is None:
            raise NothingToMeasure("no attacked prompts were read", where=self.study.spec)
        attacked = [a for a in self.artifacts if a.attack not in BASELINES]
        return wrapped(self.reading, attacked, self.study.run)

    @cached_property
    def passed(self) -> set[str]:
        """Ids of attacked prompts whose reply is no refusal: they got past it."""
        said = self.study.outcomes((a, r.reply) for a, r in self.answered)
        kept = zip(self.answered, said, strict=True)
        return {a.artifact_id for (a, _), outcome in kept if outcome not in (None, REFUSED)}

    @cached_property
    def answered(self) -> list[tuple[AttackArtifact, Replay]]:
        """Attacked prompts, no baselines, with this model's replies."""
        by_id = {a.artifact_id: a for a in self.artifacts if a.attack not in BASELINES}
        return [
            (by_id[r.artifact_id], r)
            for r in self.replays
            if r.target_model == self.study.spec and r.artifact_id in by_id
        ]

    @cached_property
    def refuses(self) -> tuple[int, int]:
        """How many held-out harmful prompts the model refuses by itself, and of how many."""
        behaviours = self.study.held_out(HARMFUL)
        replies = replies_to(self.study, behaviours)
        said = self.study.outcomes(zip(behaviours, replies, strict=True))
        return said.count(REFUSED), len(said)

    def not_aligned(self) -> list[str]:
        """Why nothing can be said of aligned models here, if it refuses too little."""
        refused, n = self.refuses
        if refused >= REFUSED_SHARE * n:
            return []
        return [f"not an aligned model: it refuses {refused} of {n} held-out harmful prompts"]

    def too_few_refusals(self) -> list[str]:
        """Why this model cannot be reopened, if it refuses too few held-out prompts by itself."""
        refused, n = self.refuses
        if refused >= REFUSED_COUNT:
            return []
        return [
            f"left alone it refuses {refused} of {n} held-out harmful prompts, fewer than "
            f"{REFUSED_COUNT}"
        ]

    def inadmissible(self, *modes: str) -> list[str]:
        """Which ablations disturb held-out safe prompts too much to be compared."""
        reasons = []
        for mode in modes:
            rows = pick(self.ablations_of_safe, mode=mode, kind="intervention")
            kl = float(np.mean(list(by_behaviour(rows, "kl").values())))
            if kl > MAX_KL:
                reasons.append(
                    f"ablating {mode} is not admissible: KL {kl:.2f} on held-out harmless prompts, "
                    f"at most {MAX_KL:.2f}"
                )
        return reasons

    def idle(self, *kinds: str) -> list[str]:
        """Which carriers do nothing, by their scores on contrast prompts."""
        scores = {kind: self.study.carrier(kind).score for kind in kinds}
        return [
            f"the {kind} carrier does nothing: refuse + comply - KL is {score:+.2f}"
            for kind, score in scores.items()
            if score <= 0
        ]

    def confounded(self) -> list[str]:
        """Why refusal cannot be told from harmfulness here, if that is so.

        Where the model refuses what is harmful and nothing else, the two contrasts are one.
        """
        if self.study.refusal_kind == "harm":
            return ["the harc estimator has no refusal apart from harmfulness: too few refusals"]
        accepted, refused = self.discordant
        if min(accepted, refused) >= SMALLEST_CLASS:
            return []
        return [
            f"refusal is not told from harmfulness: {accepted} harmful prompts accepted and "
            f"{refused} harmless ones refused, at least {SMALLEST_CLASS} of each"
        ]

    @property
    def discordant(self) -> tuple[int, int]:
        """Contrast prompts that tell refusal from harmfulness: harmful accepted, harmless refused.

        The zhao estimator compares all that are refused with all that are accepted. What part of
        its R is harmfulness depends on these two numbers.
        """
        pairs = list(zip(self.study.harmful, self.study.refused, strict=True))
        accepted = sum(h and r is False for h, r in pairs)
        return accepted, sum(not h and r is True for h, r in pairs)

    def placed(self, position: str) -> list[PlanePoint]:
        """The points of attacks by this study's directions and layer, x at a position.

        Those of the plane are by the harc estimator, at the layer of the first model.
        """
        if self.reading is None:
            return []
        study, layer, read = self.study, self.study.layer, self.reading
        along = study.harmfulness.direction[layer], study.refusal.direction[layer]
        x, y = (
            (read.activations.at(p)[:, layer].double() @ v.double()).tolist()
            for p, v in zip((position, "t_post_inst"), along, strict=True)
        )
        row_of = {info.prompt_id: n for n, info in enumerate(read.infos)}
        plain_of = dict(enumerate(plain_requests(read.infos)))
        points = []
        for p in self.points:
            n = row_of[p.prompt_id]
            start, wrap = plain_of[n], read.wrappers.get(n)
            points.append(
                replace(
                    p,
                    class_name=p.attack,
                    layer=layer,
                    position=position,
                    x=x[n],
                    y=y[n],
                    plain_x=None if start is None else x[start],
                    plain_y=None if start is None else y[start],
                    wrapper_x=None if wrap is None else x[wrap[0]] - x[wrap[1]],
                    wrapper_y=None if wrap is None else y[wrap[0]] - y[wrap[1]],
                )
            )
        return [p for p in points if np.isfinite(p.x)]

    def setting(self) -> str:
        """What the reader of a claim about carriers must know."""
        study = self.study
        h, r = study.carrier("H"), study.carrier("R")
        refused, n = self.refuses
        accepted, also = self.discordant
        tried = " and ".join(str(len(study.candidates(kind))) for kind in "HR")
        return (
            f"refuses {refused} of {n} held-out harmful prompts; of the contrast prompts accepts "
            f"{accepted} harmful and refuses {also} harmless ones; refusal estimator "
            f"{study.estimator}; "
            f"carriers H {_place(h)}, R {_place(r)}, best of {tried}"
        )


def control_changes(
    rows: Sequence[Row], mode: str, outcome: str = "d"
) -> tuple[float, dict[str, list[float]]]:
    """Mean change of an outcome from the model left alone: the intervention's, and by kind those
    of all controls."""
    alone = pick(rows, mode="none")

    def change(own: Sequence[Mapping[str, Any]]) -> float:
        return float(np.mean(list(differences(own, alone, outcome).values())))

    changes: dict[str, list[float]] = {}
    for kind in KINDS:
        of_kind = pick(rows, mode=mode, kind=kind)
        draws = sorted({r["draw"] for r in of_kind})
        if draws:
            changes[kind] = [change(pick(of_kind, draw=draw)) for draw in draws]
    return change(pick(rows, mode=mode, kind="intervention")), changes


def _place(carrier: Carrier) -> str:
    admissible = "" if carrier.admissible else ", not admissible"
    return f"{carrier.position} layer {carrier.layer} (KL {carrier.kl:.2f}{admissible})"
