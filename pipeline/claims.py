"""Which published claims hold on these models? One run folder, one table, JSON lines and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from core.errors import AttackPlaneError
from core.records import PLAIN, PlanePoint
from core.store import ATTACKS, PLANE, REPLAYS, RunFolder, read_rows, write_atomically
from core.text import aligned, short_spec
from evaluation.behaviours import load_behaviours
from geometry.verdicts import Claim
from pipeline.attack import attack
from pipeline.claim_checks import (
    TITLES,
    agreement,
    matched_effects,
    orthogonality,
    reopening,
    response_side,
    rows_of_interventions,
    separable,
    suppression,
)
from pipeline.common import artifacts_of, check_specs, replays_of
from pipeline.directions import contrast_set, directions
from pipeline.plane import plane
from pipeline.responses import responses
from pipeline.study import Study, StudyConfig
from pipeline.transfer import transfer

CLAIMS = "claims.jsonl"
ON_ATTACKS = {12, 13, 14}
TEMPLATES = (
    "nested_fiction",
    "code_completion",
    "persuasion",
    "persona",
    "refusal_suppression",
    "past_tense",
)
OWN_ATTACKS = "claims_attacks"
JUDGES = ("refusal_phrases", "target_prefix")


def claims(path: Path, specs: Sequence[str], numbers: Sequence[int], config: StudyConfig) -> list[Claim]:
    """Measure the claims ``numbers`` on every model; prints and writes ``claims.jsonl`` and ``claims.png``.

    Claims on attacks (12, 13, 14) take the run's own prompts and replies; a run without any gets the prompt-level attacks
    on the held-out harmful behaviours first.
    """
    from plots import claims_png

    check_specs(specs)
    unknown = [n for n in numbers if n not in TITLES]
    if unknown:
        known = ", ".join(map(str, TITLES))
        raise AttackPlaneError(
            "no such claim here", got=unknown, remedy=f"claims that can be measured: {known}"
        )
    numbers = sorted(numbers or TITLES)
    with RunFolder(path) as run:  # a refusal comes before hours of work
        run.begin_stage("claims", asdict(config), {})
        if ON_ATTACKS & set(numbers):
            run.begin_stage("directions", asdict(config.directions), {})
    found: list[Claim] = []
    if ON_ATTACKS & set(numbers):
        attacks(path, specs, config)
        seen = _contrast_behaviours(path, config)
        points = [PlanePoint.from_row(r) for r in read_rows(path / PLANE)]
        points = [p for p in points if p.kind == "attack" and p.frame == "own" and p.behaviour_id not in seen]
        for spec in specs:
            here = [p for p in points if p.target == spec and p.attack != PLAIN]
            found += [separable(spec, here)] if 12 in numbers else []
            found += [suppression(spec, here)] if 13 in numbers else []
    for spec in specs:
        if set(numbers) - {12, 13}:
            found += _on_model(path, spec, numbers, config)
    found.sort(key=lambda c: (c.number, specs.index(c.model)))
    new = {(c.number, c.model): c.to_row() for c in found}
    old = {(r["number"], r["model"]): r for r in read_rows(path / CLAIMS)}
    rows = sorted((old | new).values(), key=lambda r: r["number"])
    write_atomically(path / CLAIMS, "".join(json.dumps(row) + "\n" for row in rows))
    claims_png.draw(path)
    return found


def _on_model(path: Path, spec: str, numbers: Sequence[int], config: StudyConfig) -> list[Claim]:
    """The claims that need the model itself; it is gone when this returns."""
    with RunFolder(path) as run:
        study = Study(run, spec, config)
        run.begin_stage("claims", asdict(config), {spec: study.loaded.fingerprint})
        found = []
        study.held_out("harmful"), study.held_out("harmless")  # a refusal comes before the work
        if {1, 7} & set(numbers):
            rows = rows_of_interventions(study)
            found += [reopening(study, rows)] if 1 in numbers else []
            found += [matched_effects(study, rows)] if 7 in numbers else []
        found += [orthogonality(study)] if 2 in numbers else []
        if {14, 15} & set(numbers):
            try:
                replies = responses(study)
            except AttackPlaneError as error:
                return found + [
                    Claim(n, TITLES[n], spec, (), str(error), False) for n in (14, 15) if n in numbers
                ]
            if 14 in numbers:
                known = {b.request for b in study.behaviours}
                artifacts = [a for a in artifacts_of(run) if a.request not in known]
                found.append(response_side(study, replies, artifacts, replays_of(run)))
            found += [agreement(study, replies)] if 15 in numbers else []
        return found


def _contrast_behaviours(path: Path, config: StudyConfig) -> set[str]:
    """Ids of attacked behaviours whose request directions were estimated on: nothing is claimed on those."""
    known = {b.request for b in contrast_set(config.directions)}
    seen = {a.behaviour_id for a in artifacts_of(RunFolder(path)) if a.request in known}
    if seen:
        click.echo(
            f"note: {len(seen)} attacked behaviours are contrast prompts and are left out of claims 12 to 14"
        )
    return seen


def attacks(path: Path, specs: Sequence[str], config: StudyConfig) -> None:
    """Prompts, replies and the plane of all models: what the run lacks of them."""
    from attacks.templates import PlainRequests, Templates
    from transfer.replay import ReplayConfig

    with RunFolder(path) as run:
        ours = not (path / ATTACKS).exists() or OWN_ATTACKS in run.manifest["stages"]
        if ours:  # noted first: what a stopped command has begun the same command finishes
            run.begin_stage(OWN_ATTACKS, {"templates": list(TEMPLATES)}, {})
    if ours:
        behaviours = load_behaviours(config.held_out, label="harmful", splits=config.held_out_splits)
        attack(
            path,
            behaviours,
            lambda run: [
                PlainRequests(run, config.system_prompt, config.seed),
                *(Templates(run, name, config.seed, system=config.system_prompt) for name in TEMPLATES),
            ],
        )
    stages = RunFolder(path).manifest["stages"]
    if (path / REPLAYS).exists() and "transfer" in stages:
        before = dict(stages["transfer"])
        judges, replay = before.pop("judges"), ReplayConfig(**before)
    else:
        judges, replay = list(JUDGES), ReplayConfig(config.reply_tokens, 0.0, config.seed)
    click.echo(transfer(path, specs, judges, replay))
    directions(path, specs, ("harc",), config.directions, only_best_layers=1)
    plane(
        path,
        specs,
        base=None,
        estimator="harc",
        layer=None,
        anchors=config.held_out,
        anchor_splits=config.held_out_splits,
    )


def claims_table(found: Sequence[Claim]) -> str:
    """A line a check: estimate, interval, threshold, nulls, outcome; the verdict with each claim's first line."""
    rows = [
        (
            "claim",
            "model",
            "verdict",
            "check",
            "estimate",
            "interval",
            "claimed",
            "nulls' 95 %",
            "n",
            "check says",
        )
    ]
    for claim in found:
        head = (str(claim.number), short_spec(claim.model), claim.verdict)
        for c in claim.checks:
            relation = ">" if c.claimed == "above" else "<"
            nulls = ", ".join(f"{k.removesuffix('_95')} {v:.2f}" for k, v in c.nulls.items()) or "-"
            rows.append((*head, c.name, f"{c.value:+.2f}", f"[{c.low:+.2f}, {c.high:+.2f}]", f"{relation} {c.threshold:.2f}",
                         nulls, str(c.n), c.outcome))  # fmt: skip
            head = ("", "", "")
        if not claim.checks:
            rows.append((*head, claim.note[:70], "", "", "", "", "", ""))
    return aligned(rows)


def coupling_table(found: Sequence[Claim]) -> str:
    """Coupling of the carriers and effective ranks of the fields of each model that claim 2 was measured on; "" without any."""
    rows: list[tuple[str, ...]] = [("model", "C_cos", "C_sub", "C_layer", "HRCI v1, v2", "random 95 %: |cos|, C_sub, v1, v2", "principal angles",
             "effective rank H, R", "row-normalised")]  # fmt: skip
    for claim in found:
        s = claim.settings
        if claim.number == 2 and s:
            ranks = [
                ", ".join(f"{s[name][k]:.1f}" for k in "HR")
                for name in ("effective_rank", "effective_rank_normalised")
            ]
            nulls = (
                s["nulls"]["cos_95"],
                s["nulls"]["c_sub_95"],
                s["hrci_v1_random_95"],
                s["hrci_v2_random_95"],
            )
            rows.append((short_spec(claim.model), f"{s['c_cos']:+.2f}", f"{s['c_sub']:.3f}", f"{s['c_layer']:.2f}",
                         f"{s['hrci_v1']:.2f}, {s['hrci_v2']:.2f}", ", ".join(f"{v:.2f}" for v in nulls),
                         ", ".join(f"{v:.0f}" for v in s["principal_angles"]), *ranks))  # fmt: skip
    return aligned(rows) if len(rows) > 1 else ""
