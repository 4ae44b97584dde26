"""What ``claims`` and ``trajectory`` will do on one model, and how long it will take here.

The rates are measured on the spot, on a few prompts: seconds of a reply token, of an edited row
with outcome D, of one without, and of a prompt whose residuals are read. What the run folder has
already is not measured again, so that a command that goes on takes less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from core.generate import complete
from core.records import HARMFUL, HARMLESS
from core.store import ATTACKS
from evaluation.refusal_score import Openings
from geometry.activations import collect
from geometry.carriers import KEPT
from geometry.contrasts import unit
from geometry.interventions import MODES as STEERED
from geometry.interventions import Intervention, ablation
from geometry.rollout import rollout
from study.causal_sweep import CONTROLS as SWEEP_CONTROLS
from study.causal_sweep import PROMPTS as SWEPT
from study.claims.evidence import CONTROL_PROMPTS, CONTROL_TEXTS, MODES, REPLY_TOKENS
from study.claims.registry import ClaimTest
from study.intervene import SWEEP
from study.study import Study

PROBED, REPLIES, EDITS = 8, 48, 63
"""Prompts, replies and interventions that rates are measured on: whole batches, as in the work."""
ATTACK_TOKENS = 80
"""New tokens of a reply to an attacked prompt, on average."""
BACKWARD = 6
"""A gradient through prompt and reply, in passes of a prompt."""


@dataclass(frozen=True)
class Piece:
    """One piece of work: how often what is done, and how long it takes (seconds)."""

    what: str
    count: int
    unit: str
    seconds: float


@dataclass(frozen=True)
class Rates:
    """Seconds of one of each, on this model and machine."""

    reply_token: float
    row: float
    control_row: float
    row_without_texts: float
    prompt: float


def rates(study: Study) -> Rates:
    """Measured on some contrast prompts, and on random ablations at all layers."""
    loaded = study.loaded
    prompts = study.some(True, PROBED)
    directions = unit(torch.randn(EDITS, loaded.d_model, generator=torch.Generator()))
    edits = [ablation("probe", v[None], range(loaded.n_layers + 1)) for v in directions]
    texts = study.openings

    def replies() -> int:
        asked = [p.text for p in study.some(True, REPLIES)]
        complete(study.renderer, asked, max_new_tokens=study.config.reply_tokens)
        return study.config.reply_tokens * len(asked)

    def rows(of: Openings) -> int:
        refusals, compliances = of.refusals, of.compliances
        every: list[Intervention | None] = [None, *edits]
        rollout(loaded, prompts[:1], every, refusals=refusals, compliances=compliances)
        return len(every)

    def rows_without_texts() -> int:
        every: list[Intervention | None] = [None, *edits]
        rollout(loaded, prompts[:1], every, refusal_tokens=texts.first_tokens)
        return len(every)

    def residuals() -> int:
        collect(loaded, prompts, [str(n) for n in range(len(prompts))])
        return len(prompts)

    residuals()  # the first pass prepares what later ones find
    few = texts.every_other(1, CONTROL_TEXTS)
    works = (replies, lambda: rows(texts), lambda: rows(few), rows_without_texts, residuals)
    return Rates(*map(_each, works))


def _each(work: Callable[[], int]) -> float:
    """Seconds of one of what ``work`` does so often."""
    start = time.monotonic()
    count = work()
    return (time.monotonic() - start) / count


def trajectory_plan(study: Study, r: Rates, *, sweeps: bool) -> list[Piece]:
    """The pieces of one checkpoint, in the order of the work."""
    contrast = len(study.behaviours)
    held_out = sum(len(study.held_out(label)) for label in (HARMFUL, HARMLESS))
    rows = 2 * SWEPT * (1 + SWEEP_CONTROLS) * len(SWEEP) * len(STEERED)
    works = [
        ("residuals", contrast + 2 * held_out, "prompt", r.prompt),
        ("carriers, by gradients", _passes(study), "pass", BACKWARD * r.prompt),
        ("ablations", 3 * held_out, "row", r.row),
        ("steering", rows if sweeps else 0, "row", r.control_row),
    ]
    return [Piece(what, n, of, n * seconds) for what, n, of, seconds in works if n]


def _passes(study: Study) -> int:
    """Gradients of D and of KL that the search for two carriers takes."""
    config = study.config
    return 2 * config.carrier_prompts * (4 * config.refusals + 8)


def plan(
    study: Study,
    tests: Sequence[ClaimTest],
    controls: int,
    classes: int,
    known: Rates | None = None,
) -> list[Piece]:
    """The pieces of one model, in the order of the work.

    Args:
        classes: prompt-level attacks that are made where the run has none.
        known: rates that were measured before.
    """
    needs = {name for t in tests for name in t.needs}
    r, config = known or rates(study), study.config
    harmful, harmless = (len(study.held_out(label)) for label in (HARMFUL, HARMLESS))
    contrast = len(study.behaviours)
    few = min(CONTROL_PROMPTS, harmful)
    tried = config.carrier_prompts
    pieces = []

    def add(what: str, count: int, unit_of: str, seconds: float) -> None:
        pieces.append(Piece(what, count, unit_of, count * seconds))

    if "attacks" in needs:
        kept = study.run.rows(ATTACKS) if (study.run.path / ATTACKS).exists() else []
        prompts = len(kept) or harmful * (classes + 1)
        add("replies to attacked prompts", prompts, "reply", ATTACK_TOKENS * r.reply_token)
        add("residuals of attacked prompts", 2 * prompts, "prompt", r.prompt)
    add("own replies", contrast + harmful + harmless, "reply", config.reply_tokens * r.reply_token)
    add("residuals of contrast prompts", contrast, "prompt", r.prompt)
    if needs - {"attacks", "judgements"}:
        add("carriers, by gradients", _passes(study), "pass", BACKWARD * r.prompt)
    if "responses" in needs:
        add("replies under ablation", contrast, "reply", 2 * config.reply_tokens * r.reply_token)
        add("residuals of replies", contrast, "prompt", r.prompt)
    if "ablations" in needs:
        rows = len(MODES) + 1
        add(
            "ablations, harmful prompts",
            harmful * rows,
            "row",
            r.row + REPLY_TOKENS * r.reply_token,
        )
        add("ablations, harmless prompts", harmless * rows, "row", r.row)
    kinds = 2 * ("controls of R" in needs) + ("controls of H" in needs)
    if kinds:
        add("controls, searched", kinds * controls * KEPT * tried, "row", r.row_without_texts)
        add("controls, ablated", few * (kinds * controls + 2), "row", r.control_row)
    if "additions" in needs:
        add("controls, added", few * (2 * controls + 2), "row", r.control_row)
    if "judgements" in needs:
        rows = 2 * few * (2 * controls + 3)
        add("reply inversion", rows, "row", r.row_without_texts)
    return pieces
