"""What claims are measured on: one studied model, its attacked prompts and its place on the plane.

What several claims need is made once: the interventions on held-out prompts, the response side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from core.records import AttackArtifact, PlanePoint, Replay
from core.rows import Row
from geometry.carriers import Carrier
from geometry.controls import design
from geometry.effects import by_behaviour, pick
from geometry.interventions import MODES
from geometry.layers import MAX_KL
from study.outcomes import measure, site_of
from study.replies import Responses, responses
from study.study import Study

REPLY_TOKENS = 32
"""Of replies under interventions: enough for a refusal or the beginning of an answer to show."""
NATS = "nats per token"
REFUSED = 5
"""Held-out harmful prompts that a model must refuse by itself before it can be reopened."""


@dataclass(frozen=True)
class Evidence:
    """What a claim may look at.

    ``artifacts``, ``replays`` and ``points`` (own frame) are of behaviours that no direction was
    estimated on. They are there for claims that need attacks.
    """

    study: Study
    artifacts: Sequence[AttackArtifact] = ()
    replays: Sequence[Replay] = ()
    points: Sequence[PlanePoint] = ()

    @cached_property
    def interventions(self) -> list[Row]:
        """Outcome rows of the interventions that claims share, each with its controls.

        Every mode is ablated at all layers on held-out harmful prompts. Refusal is added to
        held-out harmless ones.
        """
        study = self.study
        ablate, made_from = site_of(study, None)
        seed, n = study.config.seed, study.config.controls
        edits = [
            edit
            for mode in MODES
            for edit in design(mode, "ablate", 1.0, ablate, controls=n, seed=seed)
        ]
        rows = measure(study, edits, study.held_out("harmful"), REPLY_TOKENS, made_from)
        steer, made_from = site_of(study, None, operation="steer")
        edits = design("R", "steer", 1.0, steer, controls=n, seed=seed)
        return rows + measure(study, edits, study.held_out("harmless"), 0, made_from)

    @cached_property
    def responses(self) -> Responses:
        """Response-side contrasts.

        Raises:
            AttackPlaneError: too few replies of a kind.
        """
        return responses(self.study)

    def too_few_refusals(self) -> list[str]:
        """Why this model cannot be reopened, if it refuses too few held-out prompts by itself."""
        alone = pick(self.interventions, label="harmful", mode="none")
        refused = list(by_behaviour(alone, "refused").values())
        if sum(refused) >= REFUSED:
            return []
        return [
            f"left alone it refuses {sum(refused):.0f} of {len(refused)} held-out harmful prompts, "
            f"fewer than {REFUSED}"
        ]

    def inadmissible(self, *kinds: str) -> list[str]:
        """Which of these carriers disturb safe prompts too much to be compared."""
        carriers = [(kind, self.study.carrier(kind)) for kind in kinds]
        return [
            f"the {kind} carrier is not admissible (KL {c.kl:.2f}, at most {MAX_KL:.2f})"
            for kind, c in carriers
            if not c.admissible
        ]

    def setting(self) -> str:
        """What the reader of a claim about carriers must know."""
        study = self.study
        h, r = study.carrier("H"), study.carrier("R")
        positions = f"{len(study.field('H'))} and {len(study.field('R'))} positions"
        return (
            f"refuses {study.refusal_rate:.0%} of the harmful contrast prompts; "
            f"refusal estimator {study.estimator}; "
            f"carriers H {_place(h)}, R {_place(r)}, looked for at {positions}"
        )


def _place(carrier: Carrier) -> str:
    admissible = "" if carrier.admissible else ", not admissible"
    return f"{carrier.position} layer {carrier.layer} (KL {carrier.kl:.2f}{admissible})"
