"""Interventions on models, their controls and effects: rows, summary, table and picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from core.errors import AttackPlaneError
from core.models import ModelHandle, OpenModel
from core.records import HARMFUL
from core.rows import Row
from core.store import RunFolder
from evaluation.behaviours import spread
from geometry.controls import design
from geometry.effects import summary
from geometry.interventions import touched
from pipeline.runs import check_specs, write_rows
from plots import interventions_png
from study.config import StudyConfig
from study.outcomes import measure, site_of
from study.study import Study
from transfer.agreement import Agreement, agreement_of

ROWS, SUMMARY = "interventions.jsonl", "interventions_summary.jsonl"
SWEEP = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Plan:
    """Which interventions are made.

    ``layers``: None is the operation's default, empty is all. ``limit``: prompts of each label.
    ``controls``: random directions of each kind.
    """

    modes: tuple[str, ...] = ("H", "R", "R-H")
    operation: str = "ablate"
    strengths: tuple[float, ...] = (1.0,)
    layers: tuple[int, ...] | None = None
    where: str = "all"
    labels: tuple[str, ...] = ("harmful", "harmless", "pseudo_harmful")
    limit: int | None = None
    max_new_tokens: int = 32
    controls: int = 5


@dataclass
class InterveneResult:
    """Effects (rows of ``SUMMARY``), files, and the carriers that were used, in words."""

    effects: list[Row]
    files: list[Path]
    notes: list[str]
    agreements: list[Agreement]
    """How well D says which replies under intervention comply, per model."""


def intervene(
    path: Path,
    specs: Sequence[str],
    config: StudyConfig,
    plan: Plan,
    *,
    open_model: OpenModel = ModelHandle,
) -> InterveneResult:
    """Run the plan on every model, and write rows, effects and picture."""
    check_specs(specs)
    rows: list[Row] = []
    notes: list[str] = []
    with RunFolder(path) as run:
        settings = asdict(config) | {"plan": asdict(plan)}
        run.begin_stage("intervene", settings, {}, derived=True)
        for spec in specs:
            study = Study(run, open_model(spec), config)
            fingerprint = {spec: study.model.fingerprint}
            run.begin_stage("intervene", settings, fingerprint, derived=True)
            rows += of_model(study, plan, notes)
            del study
        # what the model said stays in the run's measurements
        silent = ({k: v for k, v in row.items() if k != "reply"} for row in rows)
        effects = summary(rows)
        files = [write_rows(path / ROWS, silent), write_rows(path / SUMMARY, effects)]
    files.append(interventions_png.draw(path))
    return InterveneResult(effects, files, notes, d_agreements(rows))


def d_agreements(rows: Sequence[Row]) -> list[Agreement]:
    """Agreement of D with success over all interventions on harmful prompts, per model."""
    cells: dict[str, list[tuple[float, bool, str]]] = {}
    for r in rows:
        if r["label"] == HARMFUL and r["complied"] is not None:
            cell = (r["d"], bool(r["complied"]), r["behaviour_id"])
            cells.setdefault(r["model"], []).append(cell)
    return [agreement_of(model, own) for model, own in cells.items()]


def of_model(study: Study, plan: Plan, notes: list[str]) -> list[Row]:
    """Outcome rows of one model; what should be told is added to ``notes``."""
    every = tuple(range(study.loaded.n_layers + 1))
    layers = every if plan.layers == () else plan.layers
    outside = [layer for layer in layers or () if layer not in every]
    if outside:
        raise AttackPlaneError(
            "no such layer", where=study.spec, got=outside, remedy=f"0 to {every[-1]}"
        )
    touched(study.prompts[0], plan.where)  # a refusal comes before the work
    held_out = {}
    for label in plan.labels:
        try:
            held_out[label] = spread(study.held_out(label), plan.limit)
        except AttackPlaneError as error:
            if plan.labels != Plan.labels or label == "harmful":
                raise
            notes.append(f"no {label} prompts: {error}")
    site, made_from = site_of(study, layers, where=plan.where, operation=plan.operation)
    notes += [carrier_text(study, kind) for kind in "HR"]
    edits = [
        edit
        for mode in dict.fromkeys(plan.modes)
        for strength in dict.fromkeys(plan.strengths)
        for edit in design(
            mode,
            plan.operation,
            strength,
            site,
            controls=plan.controls,
            seed=study.config.seed,
        )
    ]
    rows: list[Row] = []
    for behaviours in held_out.values():
        rows += measure(study, edits, behaviours, plan.max_new_tokens, made_from)
    return rows


def carrier_text(study: Study, kind: str) -> str:
    """A carrier in words: place, KL, and how it moves refusals (nats per token)."""
    c = study.carrier(kind)
    admissible = "" if c.admissible else " (none is admissible)"
    estimator = study.estimator if kind == "R" else "harc"
    return (
        f"{study.spec}: {kind} carrier {c.position}, layer {c.layer}, KL {c.kl:.3f}{admissible}, "
        f"comply {c.comply:+.2f}, refuse {c.refuse:+.2f} nats per token; estimator {estimator}"
    )
