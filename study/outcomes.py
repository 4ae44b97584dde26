"""Interventions on a studied model with their controls, and their outcomes on held-out prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from core.records import Behaviour, content_hash
from core.rows import Row
from evaluation.judges import OUTCOMES
from evaluation.refusal_score import Openings
from geometry.controls import Site, far_layer
from geometry.interventions import Intervention
from geometry.rollout import Outcome, rollout
from pipeline.contrast_reading import rendered
from study.study import Study

TOGETHER, ROWS = 4, 64
"""Prompts whose outcomes are kept as one piece: what a stopped command loses at most. More where
that makes no more rows than this: prompts of one length share their passes."""


def site_of(
    study: Study, layers: Sequence[int] | None, *, where: str = "all", operation: str = "ablate"
) -> tuple[Site, Any]:
    """The best carriers as the vectors of interventions, those of other places as controls.

    Also returned: what they depend on.

    ``layers``: None is all layers for an ablation, the refusal carrier's own for steering. Steering
    strengths are in units of the refusal carrier's class difference.
    """
    h, r = study.carrier("H"), study.carrier("R")
    n = study.loaded.n_layers
    chosen = (
        tuple(layers)
        if layers is not None
        else tuple(range(n + 1))
        if operation == "ablate"
        else (r.layer,)
    )
    fields = study.field("H")[h.position], study.field("R")[r.position]
    far = tuple(c.direction[far_layer(k.layer, n)] for c, k in zip(fields, (h, r), strict=True))
    kinds = (("harm", h), (study.refusal_kind, r))
    first = tuple(study.contrast(kind, "t_first").direction[k.layer] for kind, k in kinds)
    site = Site(
        (h.vector, r.vector),
        {"wrong_layer": (far[0], far[1]), "wrong_position": (first[0], first[1])},
        chosen,
        tuple(far_layer(layer, n) for layer in chosen),
        where,
        r.norm if operation == "steer" else 1.0,
        study.config.outputs,
    )
    return site, [study.place(h), study.place(r), study.config.seed, *study.how]


def measure(
    study: Study,
    interventions: Sequence[Intervention],
    behaviours: Sequence[Behaviour],
    tokens: int,
    made_from: Any,
    texts: Openings | None = None,
) -> list[Row]:
    """Outcome rows of behaviours under interventions and left alone, for ``geometry.effects``.

    ``made_from``: what the interventions' vectors depend on, besides the contrast set. What would
    do the same in several modes is run once. ``texts``: those of outcome D, where not all are
    scored.
    """
    prompts = rendered(study.renderer, behaviours, study.config.system_prompt)
    names = [_identity(edit) for edit in interventions]
    todo = dict(zip(names, interventions, strict=True))
    edits = [None, *todo.values()]
    texts = texts or study.openings
    rows: list[Row] = []
    together = max(TOGETHER, ROWS // len(edits))
    for start in range(0, len(behaviours), together):
        part = slice(start, start + together)

        def make(part: slice = part) -> list[list[Row]]:
            outcomes = rollout(
                study.loaded,
                prompts[part],
                edits,
                refusals=texts.refusals,
                compliances=texts.compliances,
                refusal_tokens=texts.first_tokens,
                max_new_tokens=tokens,
                description=f"interventions, {len(prompts)} prompts, from {part.start + 1}",
            )
            return [[_kept(study, o) for o in row] for row in outcomes]

        requests = [b.request for b in behaviours[part]]
        depends = [*study.set_identity, requests, tokens, asdict(texts), made_from, list(todo)]
        kept = study.kept("outcomes", depends, make)
        for behaviour, (alone, *values) in zip(behaviours[part], kept, strict=True):
            of = dict(zip(todo, values, strict=True)) | {"none": alone}
            judged = _judged(study, behaviour, of, tokens)
            whose = {
                "model": study.spec,
                "label": behaviour.label,
                "behaviour_id": behaviour.behaviour_id,
            }
            for name, edit in [("none", None), *zip(names, interventions, strict=True)]:
                rows.append(whose | _described(edit) | of[name] | judged[name])
    return rows


def _kept(study: Study, outcome: Outcome) -> Row:
    """What is kept of one rollout in the run folder."""
    return {
        "kl": outcome.kl,
        "refusal": outcome.refusal,
        "d": outcome.d,
        "log_odds": outcome.log_odds,
        "delta_norm": outcome.delta_norm,
        "reply": study.text(outcome.reply),
    }


def _judged(
    study: Study, behaviour: Behaviour, of: Row, tokens: int
) -> dict[str, dict[str, float | None]]:
    """By intervention: 1 for what the reply is, 0 for what it is not; None where that is not known.

    Replies are judged when they are read, not when they are kept.
    """
    if not tokens:
        return {name: dict.fromkeys(OUTCOMES) for name in of}
    said = study.outcomes((behaviour, row["reply"]) for row in of.values())
    return {
        name: {kind: None if outcome is None else float(outcome == kind) for kind in OUTCOMES}
        for name, outcome in zip(of, said, strict=True)
    }


def _described(edit: Intervention | None) -> Row:
    if edit is None:
        return {"mode": "none", "operation": "none", "strength": 0.0, "kind": "none", "draw": 0}
    return {
        "mode": edit.name,
        **{k: getattr(edit, k) for k in ("operation", "strength", "kind", "draw")},
    }


def _identity(edit: Intervention) -> str:
    """What an intervention is: two that would do the same have one identity."""
    followed = edit.follows
    vectors = [edit.read, edit.write, edit.shift]
    vectors += [followed.read, followed.write] if followed else []
    return content_hash(
        [
            [
                None
                if v is None
                else hashlib.sha256(v.cpu().contiguous().numpy().tobytes()).hexdigest()
                for v in vectors
            ],
            [edit.layers, edit.where, edit.outputs],
        ]
    )
