"""Which published claims hold on these models? One run folder, one table, JSON lines and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from core.errors import AttackPlaneError
from core.records import PlanePoint
from core.store import ATTACKS, PLANE, REPLAYS, RunFolder, read_rows, write_atomically
from core.text import aligned, short_spec
from evaluation.behaviours import load_behaviours
from geometry.plane import SEPARABILITY
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
from pipeline.directions import directions
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
    found: list[Claim] = []
    if ON_ATTACKS & set(numbers):
        attacks(path, specs, config)
        points = [PlanePoint.from_row(r) for r in read_rows(path / PLANE)]
        regions = read_rows(path / SEPARABILITY)
        for spec in specs:
            found += [separable(spec, regions)] if 12 in numbers else []
            found += [suppression(spec, points)] if 13 in numbers else []
    for spec in specs:
        if set(numbers) - {12, 13}:
            found += _on_model(path, spec, numbers, config)
    found.sort(key=lambda c: (c.number, specs.index(c.model)))
    write_atomically(path / CLAIMS, "".join(json.dumps(c.to_row()) + "\n" for c in found))
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
                found.append(response_side(study, replies, artifacts_of(run), replays_of(run)))
            found += [agreement(study, replies)] if 15 in numbers else []
        return found


def attacks(path: Path, specs: Sequence[str], config: StudyConfig) -> None:
    """Prompts, replies and the plane of all models: what the run lacks of them."""
    from attacks.templates import PlainRequests, Templates
    from transfer.replay import ReplayConfig

    if not (path / ATTACKS).exists():
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
