"""The run's prompts and the anchors on the plane of every target: projected, exported, drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from core.errors import AttackPlaneError
from core.prompt import Conversation, Renderer
from core.records import AttackArtifact, Behaviour, Directions, PlanePoint
from core.store import RunFolder, write_atomically
from core.text import short_spec
from evaluation.behaviours import load_behaviours
from geometry.activations import collect
from geometry.directions import best_layers
from geometry.plane import Nulls, PromptInfo, displacement_nulls, export, points, project
from geometry.storage import load_directions
from pipeline.common import artifacts_of, check_specs, opened, replays_of
from pipeline.directions import rendered

TRAJECTORIES = "plane_trajectories.jsonl"
SNAPSHOTS = 12
"""Most prompts of one optimisation that are projected."""


def plane(
    path: Path,
    targets: Sequence[str],
    *,
    base: str | None,
    estimator: str,
    layer: int | None,
    anchors: str,
    anchor_splits: Sequence[str],
) -> list[Path]:
    """Project the run's prompts and the anchors on every target, export and draw; replaces an earlier plane.

    Without ``targets``: every target that the run has replays on. Without ``base``: the first target.
    """
    from plots import plane_html, plane_png, trajectories_png

    with RunFolder.existing(path) as run:
        artifacts = artifacts_of(run)
        replays = replays_of(run)
        targets = targets or list(dict.fromkeys(r.target_model for r in replays))
        if not targets:
            raise AttackPlaneError("no targets", where=path, remedy="give --target, or run `transfer` first")
        base = base or targets[0]
        check_specs([*targets, base])
        frame = load_directions(path, base, estimator)
        own = {spec: load_directions(path, spec, estimator) for spec in targets}
        chosen = best_layers(frame)[0] if layer is None else layer
        anchor_rows = load_behaviours(anchors, splits=anchor_splits)
        run.note_behaviours(anchor_rows)
        system = frame.settings.get("system_prompt")
        if any(a.system_prompt != system for a in artifacts):
            click.echo(
                "note: directions and attacks have different system prompts; part of a point is the system prompt"
            )
        infos = prompt_infos(run, artifacts, anchor_rows)
        verdicts = {(r.artifact_id, r.target_model): r.jailbroken for r in replays}
        everything: list[PlanePoint] = []
        nulls: Nulls = {}
        settings = {"base": base, "estimator": estimator, "layer": chosen, "targets": list(targets)}
        settings |= {"anchors": anchors, "anchor_splits": list(anchor_splits)}

        def read(spec: str) -> None:  # a function, so that one model is gone before the next is loaded
            loaded = opened(spec)
            run.begin_stage("plane", settings, {spec: loaded.fingerprint}, derived=True)
            renderer = Renderer(loaded)
            prompts = rendered(renderer, anchor_rows, system)
            there = infos[: len(anchor_rows)]
            for a, info in zip(artifacts, infos[len(anchor_rows) :], strict=True):
                conversation = Conversation.of_prompt(
                    a.prompt, request=a.request, suffix=a.suffix, system=a.system_prompt
                )
                try:
                    prompts.append(renderer.render(conversation, allow_trim=True))
                except AttackPlaneError as error:
                    click.echo(f"not on the plane of {spec}: {a.attack} {a.behaviour_id}. {error}")
                else:
                    there.append(info)
            judged = [replace(i, jailbroken=verdicts.get((i.prompt_id, spec))) for i in there]
            activations = collect(loaded, prompts, [i.prompt_id for i in there])
            everything.extend(points(activations, judged, own[spec], frame, chosen))
            nulls.update(displacement_nulls(activations, judged, own[spec], frame, chosen))
            trajectories.extend(
                trajectory_rows(renderer, artifacts, {"base": frame, "own": own[spec]}, chosen)
            )

        trajectories: list[dict[str, Any]] = []
        for spec in targets:
            read(spec)
        written = export(everything, path, nulls)
        write_atomically(path / TRAJECTORIES, "".join(json.dumps(row) + "\n" for row in trajectories))
        drawn = [plane_png.draw(path), plane_html.draw(path)]
        (path / trajectories_png.NAME).unlink(missing_ok=True)
        if trajectories:
            drawn += [path / TRAJECTORIES, trajectories_png.draw(path)]
        return [*written, *drawn]


def trajectory_rows(
    renderer: Renderer, artifacts: Sequence[AttackArtifact], frames: dict[str, Directions], layer: int
) -> list[dict[str, Any]]:
    """Where the prompts that were the best in turn lie, step by step of their optimisation; at most ``SNAPSHOTS`` of each."""
    chosen = []
    for a in artifacts:
        last = len(a.snapshots) - 1
        kept = sorted({round(i * last / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)}) if last > 0 else []
        chosen += [(a, a.snapshots[i]) for i in kept]
    if not chosen:
        return []
    prompts, there = [], []
    for a, s in chosen:
        try:
            prompts.append(
                renderer.render(Conversation(s["prompt"], system=a.system_prompt), allow_trim=True)
            )
        except AttackPlaneError:
            continue  # the artifact's own prompt was refused too, and told
        there.append((a, s))
    chosen = there
    if not chosen:
        return []
    ids = [f"{a.artifact_id} {s['step']}" for a, s in chosen]
    activations = collect(
        renderer.loaded, prompts, ids, positions=("t_inst", "t_post_inst"), description="trajectories"
    )
    rows = []
    for name, d in frames.items():
        x, _ = project(activations.at("t_inst")[:, layer], d.harmfulness[layer], d.harmless_t_inst[layer])
        y, _ = project(
            activations.at("t_post_inst")[:, layer], d.refusal[layer], d.harmless_t_post_inst[layer]
        )
        rows += [
            {
                "artifact_id": a.artifact_id,
                "behaviour_id": a.behaviour_id,
                "attack": a.attack,
                "source": a.source_model,
                "target": renderer.loaded.spec,
                "frame": name,
                "layer": layer,
                "step": s["step"],
                "loss": a.loss_history[s["step"]],
                "x": float(x[i]),
                "y": float(y[i]),
            }
            for i, (a, s) in enumerate(chosen)
        ]
    return rows


def prompt_infos(
    run: RunFolder, artifacts: Sequence[AttackArtifact], anchors: Sequence[Behaviour]
) -> list[PromptInfo]:
    """What the plane says about each prompt, anchors first; verdicts are filled in target by target."""
    labels = {b.behaviour_id: b.label for b in run.behaviours().values()}
    sources: dict[str, set[str]] = {}
    for a in artifacts:
        sources.setdefault(a.attack, set()).add(a.source_model)
    infos = [
        PromptInfo(
            prompt_id=b.behaviour_id,
            behaviour_id=b.behaviour_id,
            kind="anchor",
            class_name=f"{b.label} (anchor)",
            label=b.label,
            attack="none",
            source="none",
            jailbroken=None,
        )
        for b in anchors
    ]
    infos += [
        PromptInfo(
            prompt_id=a.artifact_id,
            behaviour_id=a.behaviour_id,
            kind="attack",
            class_name=f"{a.attack} from {short_spec(a.source_model)}"
            if len(sources[a.attack]) > 1
            else a.attack,
            label=labels.get(a.behaviour_id, "harmful"),
            attack=a.attack,
            source=a.source_model,
            jailbroken=None,
            system=a.system_prompt,
        )
        for a in artifacts
    ]
    return infos
