"""The stages, joined: each reads and writes a run folder. ``cli.py`` calls these; ``demo`` is the whole experiment.

attack -> transfer -> directions -> plane           (train_sft makes targets; verify and show read)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from attacks.gcg import GCGConfig
from attacks.run import GCG, Attacker, draft_model
from attacks.verify import Verification, verify_artifact
from core.errors import AttackPlaneError
from core.generate import complete
from core.models import LoadedModel, load, parse_spec
from core.prompt import Conversation, Prompt, Renderer
from core.records import AttackArtifact, Behaviour, Directions, PlanePoint, Replay, content_hash
from core.store import ATTACKS, REPLAYS, RunFolder, write_atomically
from evaluation.behaviours import load_behaviours
from evaluation.judges import is_refusal, make_judge
from geometry.activations import collect
from geometry.directions import EstimateConfig, best_layers, classes, estimate
from geometry.plane import Nulls, PromptInfo, displacement_nulls, export, points
from geometry.storage import directions_path, load_directions, save_directions
from reports import directions_table, matrix_table
from training.sft import SFTConfig, train
from transfer.matrix import matrix
from transfer.replay import ReplayConfig, replay_all

log = logging.getLogger(__name__)
CONTRAST = "contrast.jsonl"


def artifacts_of(run: RunFolder) -> list[AttackArtifact]:
    return [
        AttackArtifact.from_row(row, f"{run.path / ATTACKS}, line {n}")
        for n, row in enumerate(run.rows(ATTACKS), start=1)
    ]


def replays_of(run: RunFolder) -> list[Replay]:
    return [
        Replay.from_row(row, f"{run.path / REPLAYS}, line {n}")
        for n, row in enumerate(run.rows(REPLAYS), start=1)
    ]


def check_specs(specs: Sequence[str]) -> None:
    """Refuse a mistyped spec before hours of work on the others."""
    for spec in specs:
        parse_spec(spec)


def opened(spec: str) -> LoadedModel:
    """Load a model and say what it is."""
    loaded = load(spec)
    click.echo(loaded.describe())
    return loaded


# --- attack -----------------------------------------------------------------------------------------------------------
def attack(
    path: Path,
    source: LoadedModel,
    behaviours: Sequence[Behaviour],
    config: GCGConfig,
    *,
    seed: int,
    save_every: int,
    baselines: bool,
    engine: str = GCG,
    engine_options: Mapping[str, Any] | None = None,
) -> list[AttackArtifact]:
    with RunFolder(path) as run:
        draft = draft_model(source, config.draft) if config.draft else None
        attacker = Attacker(run, source, config, seed, save_every, engine, engine_options or {}, draft)
        settings = {**attacker.settings(engine), "seed": seed}
        models = {model.spec: model.fingerprint for model in (source, draft) if model}
        run.begin_stage(engine, settings, models)
        return attacker.attack(behaviours, baselines=baselines)


# --- transfer ---------------------------------------------------------------------------------------------------------
def transfer(
    path: Path, targets: Sequence[str], judges: Sequence[str], config: ReplayConfig, batch_size: int = 16
) -> str:
    """Replay every artifact on every target; returns the matrix as text."""
    check_specs(targets)
    with RunFolder.existing(path) as run:
        artifacts = artifacts_of(run)
        if not artifacts:
            raise AttackPlaneError("no artifacts in this run", where=path, remedy="run `gcg` first")
        loaded_judges = [make_judge(spec) for spec in judges]
        settings = {**asdict(config), "judges": list(judges)}
        run.begin_stage("transfer", settings, {})

        def replay_on(spec: str) -> None:  # a function, so that one model is gone before the next is loaded
            target = opened(spec)
            run.begin_stage("transfer", settings, {spec: target.fingerprint})
            replay_all(run, target, artifacts, loaded_judges, config, batch_size=batch_size)

        for spec in targets:
            replay_on(spec)
        cells = matrix(replays_of(run))
        lines = [json.dumps(cell.to_row()) + "\n" for cell in cells]
        write_atomically(path / "matrix.jsonl", "".join(lines))
        return matrix_table(cells)


# --- directions -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DirectionsConfig:
    """What directions are estimated on. ``reply_tokens``: of the model's own replies that say refused or accepted."""

    contrast: str = "demonstration"
    splits: tuple[str, ...] = ("train", "validation")
    reply_tokens: int = 24
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
    refused = contrast_replies(run, renderer, behaviours, config, made_from)
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
    made_from: str,
) -> list[bool | None]:
    """Whether the model's own greedy reply refused each contrast prompt, by our refusal phrases."""
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
    replies = [rows[0]["replies"][b.behaviour_id] for b in behaviours]
    return [is_refusal(reply) if reply.strip() else None for reply in replies]


# --- plane ------------------------------------------------------------------------------------------------------------
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
    from plots import plane_html, plane_png

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
            for a in artifacts:
                conversation = Conversation.of_prompt(
                    a.prompt, request=a.request, suffix=a.suffix, system=a.system_prompt
                )
                prompts.append(renderer.render(conversation, allow_trim=True))
            judged = [replace(i, jailbroken=verdicts.get((i.prompt_id, spec))) for i in infos]
            activations = collect(loaded, prompts, [i.prompt_id for i in infos])
            everything.extend(points(activations, judged, own[spec], frame, chosen))
            nulls.update(displacement_nulls(activations, judged, own[spec], frame, chosen))

        for spec in targets:
            read(spec)
        written = export(everything, path, nulls)
        return [*written, plane_png.draw(path), plane_html.draw(path)]


def prompt_infos(
    run: RunFolder, artifacts: Sequence[AttackArtifact], anchors: Sequence[Behaviour]
) -> list[PromptInfo]:
    """What the plane says about each prompt, anchors first; verdicts are filled in target by target."""
    labels = {b.behaviour_id: b.label for b in run.behaviours().values()}
    several = len({a.source_model for a in artifacts}) > 1
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
            class_name=f"{a.attack} from {a.source_model}" if several else a.attack,
            label=labels.get(a.behaviour_id, "harmful"),
            attack=a.attack,
            source=a.source_model,
            jailbroken=None,
        )
        for a in artifacts
    ]
    return infos


# --- train, verify ----------------------------------------------------------------------------------------------------
def train_sft(spec: str, out: Path, config: SFTConfig, behaviours: str = "demonstration") -> list[Path]:
    """Refusal fine-tuning on the training split of a behaviour set; checkpoints are folders ``out/step-N``."""
    harmful = load_behaviours(behaviours, label="harmful", splits=["train"])
    harmless = load_behaviours(behaviours, label="harmless", splits=["train"])
    text = (Path(__file__).parent / "evaluation" / "data" / "refusals.txt").read_text()
    phrases = text.strip().splitlines()
    refusals = [(b.request, phrases[i % len(phrases)]) for i, b in enumerate(harmful)]

    def own_replies(loaded: LoadedModel, requests: Sequence[str], tokens: int) -> list[tuple[str, bool]]:
        renderer = Renderer(loaded)
        texts = [renderer.text(Conversation.build(request)) for request in requests]
        replies = complete(
            renderer, texts, max_new_tokens=tokens, batch_size=32, description="base model's replies"
        )
        lengths = [len(ids) for ids in renderer.tokenise(replies)]
        return [(reply, n < tokens - 1) for reply, n in zip(replies, lengths, strict=True)]

    return train(spec, refusals, [b.request for b in harmless], config, out, own_replies=own_replies)


def verify(path: Path, tolerance: float) -> Iterator[tuple[AttackArtifact, Verification]]:
    """Check every artifact of a run, source model by source model."""
    run = RunFolder.existing(path)
    artifacts = artifacts_of(run)
    if not artifacts:
        raise AttackPlaneError("no artifacts to verify in this run", where=path / ATTACKS)
    recorded = run.manifest["models"]
    for spec in dict.fromkeys(a.source_model for a in artifacts):
        loaded = opened(spec)
        if recorded.get(spec, loaded.fingerprint) != loaded.fingerprint:
            raise AttackPlaneError(
                "the source model is not the one of the run (other files or precision)",
                where=spec,
                got=f"{recorded[spec]} in the run, now {loaded.fingerprint}",
                remedy="give the precision in the spec (?dtype=...) so that it is the same on every device",
            )
        renderer = Renderer(loaded)
        for artifact in artifacts:
            if artifact.source_model == spec:
                yield artifact, verify_artifact(renderer, artifact, tolerance=tolerance)
