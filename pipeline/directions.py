"""Directions of each model, from a contrast set and the model's own replies to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from core.errors import AttackPlaneError
from core.generate import complete
from core.prompt import Conversation, Prompt, Renderer
from core.records import Behaviour, Directions, content_hash
from core.store import RunFolder
from evaluation.behaviours import load_behaviours
from evaluation.judges import is_refusal
from geometry.activations import collect
from geometry.directions import EstimateConfig, classes, estimate
from geometry.storage import directions_path, load_directions, save_directions
from pipeline.common import check_specs, opened
from pipeline.reports import directions_table

CONTRAST = "contrast.jsonl"


@dataclass(frozen=True)
class DirectionsConfig:
    """What directions are estimated on. ``reply_tokens``: of the model's own replies, which say refused or accepted and whose
    mean is the response side."""

    contrast: str = "demonstration"
    splits: tuple[str, ...] = ("train", "validation")
    reply_tokens: int = 32
    resamples: int = 200
    seed: int = 0
    system_prompt: str | None = None


def contrast_set(config: DirectionsConfig) -> list[Behaviour]:
    both = [
        load_behaviours(config.contrast, label=label, splits=config.splits)
        for label in ("harmful", "harmless")
    ]
    return both[0] + both[1]


def rendered(renderer: Renderer, behaviours: Sequence[Behaviour], system: str | None) -> list[Prompt]:
    return [renderer.render(Conversation.build(b.request, system=system)) for b in behaviours]


def directions(
    path: Path,
    specs: Sequence[str],
    estimators: Sequence[str],
    config: DirectionsConfig,
    *,
    only_best_layers: int | None = None,
) -> list[Directions]:
    """Estimate, save and print directions of each model; those already in the run with these settings are loaded."""
    check_specs(specs)
    behaviours = contrast_set(config)
    found = []
    with RunFolder(path) as run:
        run.begin_stage("directions", asdict(config), {})
        for spec in specs:
            made_from = directions_of(run, spec, behaviours, estimators, config)
            for estimator in estimators:
                if _have(path, spec, estimator, made_from):
                    found.append(load_directions(path, spec, estimator))
                    click.echo(directions_table(found[-1], only_best_layers))
    return found


def directions_of(
    run: RunFolder,
    spec: str,
    behaviours: Sequence[Behaviour],
    estimators: Sequence[str],
    config: DirectionsConfig,
) -> str:
    """Make what is missing of one model's directions; returns the hash of what they are made from."""
    loaded = opened(spec)
    run.begin_stage("directions", asdict(config), {spec: loaded.fingerprint})
    made_from = content_hash([asdict(config), loaded.fingerprint, [b.request for b in behaviours]])
    missing = [e for e in estimators if not _have(run.path, spec, e, made_from)]
    if not missing:
        return made_from
    renderer = Renderer(loaded)
    refused = verdicts(contrast_replies(run, renderer, behaviours, config))
    prompts = rendered(renderer, behaviours, config.system_prompt)
    activations = collect(loaded, prompts, [b.behaviour_id for b in behaviours])
    harmful = [b.label == "harmful" for b in behaviours]
    for estimator in missing:
        try:
            classes(estimator, harmful, refused)
        except AttackPlaneError as error:
            if len(estimators) == 1:
                raise
            click.echo(f"{spec}: no {estimator} directions. {error}")
            continue
        estimated = estimate(
            activations,
            harmful,
            estimator=estimator,
            refused=refused,
            config=EstimateConfig(config.resamples, config.seed),
        )
        estimated.settings["system_prompt"] = config.system_prompt
        save_directions(estimated, run.path, {"made_from": made_from})
    return made_from


def _have(path: Path, spec: str, estimator: str, made_from: str) -> bool:
    note = directions_path(path, spec, estimator).with_suffix(".json")
    return note.exists() and json.loads(note.read_text()).get("made_from") == made_from


def contrast_replies(
    run: RunFolder,
    renderer: Renderer,
    behaviours: Sequence[Behaviour],
    config: DirectionsConfig,
) -> list[str]:
    """The model's own greedy reply to each contrast prompt, made once a run."""
    made_from = content_hash(
        [
            renderer.loaded.fingerprint,
            config.reply_tokens,
            config.system_prompt,
            [b.request for b in behaviours],
        ]
    )
    rows = [r for r in run.rows(CONTRAST) if r["made_from"] == made_from]
    if not rows:
        texts = [
            renderer.text(Conversation.build(b.request, system=config.system_prompt)) for b in behaviours
        ]
        replies = complete(
            renderer, texts, max_new_tokens=config.reply_tokens, batch_size=32, description="own replies"
        )
        row = {
            "made_from": made_from,
            "model": renderer.loaded.spec,
            "replies": {b.behaviour_id: reply for b, reply in zip(behaviours, replies, strict=True)},
        }
        run.append(CONTRAST, row)
        rows = [row]
    return [rows[0]["replies"][b.behaviour_id] for b in behaviours]


def verdicts(replies: Sequence[str]) -> list[bool | None]:
    """Whether each reply refused, by our refusal phrases; None for an empty one."""
    return [is_refusal(reply) if reply.strip() else None for reply in replies]
