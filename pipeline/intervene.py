"""Interventions on models, their controls and effects: rows, summary, table and picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from core.errors import AttackPlaneError
from core.store import RunFolder, write_atomically
from core.text import aligned, short_spec
from geometry.designs import design
from geometry.effects import summary
from geometry.interventions import touched
from pipeline.common import check_specs
from pipeline.outcomes import measure, site_of
from pipeline.study import Study, StudyConfig

ROWS, SUMMARY = "interventions.jsonl", "interventions_summary.jsonl"
SWEEP = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
SHOWN = {
    "harmful": ("complied", "degenerate", "refusal"),
    "harmless": ("refused", "refusal", "kl"),
    "pseudo_harmful": ("refused",),
}
"""Outcomes in the table, by label; the summary has all."""


@dataclass(frozen=True)
class Plan:
    """``layers``: None for the default of the operation, empty for all. ``limit``: prompts of each label."""

    modes: tuple[str, ...] = ("H", "R", "R-H")
    operation: str = "ablate"
    strengths: tuple[float, ...] = (1.0,)
    layers: tuple[int, ...] | None = None
    where: str = "all"
    labels: tuple[str, ...] = ("harmful", "harmless", "pseudo_harmful")
    limit: int | None = None
    max_new_tokens: int = 20


def intervene(path: Path, specs: Sequence[str], config: StudyConfig, plan: Plan) -> list[dict[str, Any]]:
    """Run the plan on every model; returns the summary's rows."""
    from plots import interventions_png

    check_specs(specs)
    rows: list[dict[str, Any]] = []
    with RunFolder(path) as run:
        settings = asdict(config) | {"plan": asdict(plan)}
        run.begin_stage("intervene", settings, {}, derived=True)
        for spec in specs:
            study = Study(run, spec, config)
            run.begin_stage("intervene", settings, {spec: study.loaded.fingerprint}, derived=True)
            rows += of_model(study, plan)
            del study
        # what the model said stays in the run's measurements
        lines = (json.dumps({k: v for k, v in row.items() if k != "reply"}) + "\n" for row in rows)
        write_atomically(path / ROWS, "".join(lines))
        found = summary(rows)
        write_atomically(path / SUMMARY, "".join(json.dumps(row) + "\n" for row in found))
    interventions_png.draw(path)
    return found


def of_model(study: Study, plan: Plan) -> list[dict[str, Any]]:
    """Outcome rows of one model."""
    every = tuple(range(study.loaded.n_layers + 1))
    layers = every if plan.layers == () else plan.layers
    outside = [layer for layer in layers or () if layer not in every]
    if outside:
        raise AttackPlaneError("no such layer", where=study.spec, got=outside, remedy=f"0 to {every[-1]}")
    touched(study.prompts[0], plan.where)  # a refusal comes before the work
    held_out = {}
    for label in plan.labels:
        try:
            held_out[label] = study.held_out(label)[: plan.limit]
        except AttackPlaneError as error:
            if plan.labels != Plan.labels or label == "harmful":
                raise
            click.echo(f"no {label} prompts: {error}")
    site, made_from = site_of(study, layers, where=plan.where, operation=plan.operation)
    for kind in "HR":
        c = study.carrier(kind)
        click.echo(
            f"{kind} carrier: {c.position}, layer {c.layer}, KL {c.kl:.3f}{'' if c.admissible else ' (none is admissible)'}, "
            f"comply {c.comply:+.2f}, refuse {c.refuse:+.2f} nats per token; estimator {study.estimator if kind == 'R' else 'harc'}"
        )
    edits = [
        edit
        for mode in dict.fromkeys(plan.modes)
        for strength in dict.fromkeys(plan.strengths)
        for edit in design(
            mode, plan.operation, strength, site, controls=study.config.controls, seed=study.config.seed
        )
    ]
    rows: list[dict[str, Any]] = []
    for behaviours in held_out.values():
        rows += measure(study, edits, behaviours, plan.max_new_tokens, made_from)
    return rows


def effects_table(found: Sequence[dict[str, Any]]) -> str:
    """Per mode, strength and outcome: alone, under the intervention, and the effects against both kinds of control."""
    header = ("model", "intervention", "prompts", "n", "outcome", "alone", "value", "change", "interval", "- controls", "interval",
              "- matched", "interval", "moved: own, controls, matched")  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    for r in found:
        if r["outcome"] not in SHOWN.get(r["label"], ()) or r["value"] is None:
            continue
        cells = []
        for key in ("change", "effect_controls", "effect_matched"):
            ends = r[f"{key}_interval"]
            cells += (
                [f"{r[key]:+.2f}", f"[{ends[0]:+.2f}, {ends[1]:+.2f}]"] if r[key] is not None else ["-", ""]
            )
        moved = ", ".join(
            "-" if r[k] is None else f"{r[k]:.1f}"
            for k in ("delta_norm", "controls_delta_norm", "matched_delta_norm")
        )
        name = f"{r['operation']} {r['mode']} {r['strength']:g}"
        rows.append((short_spec(r["model"]), name, r["label"], str(r["n"]), r["outcome"], f"{r['alone']:.2f}", f"{r['value']:.2f}",
                     *cells, moved))  # fmt: skip
    return aligned(rows)
