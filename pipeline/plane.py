"""The run's prompts and the anchors on the plane of every target: projected, exported, drawn.

One target's model is read at a time. The files replace those of an earlier plane; where nothing
that they depend on has changed they stay, and no weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from core.errors import AttackPlaneError
from core.files import ANEW, read_object, write_atomically
from core.models import ModelHandle, OpenModel
from core.prompt import Conversation, Prompt, Renderer
from core.readings import Activations, Directions, PlanePoint
from core.records import HARMFUL, PLAIN, AttackArtifact, Behaviour, content_hash
from core.rows import Row
from core.served import is_served
from core.specs import short_spec
from core.store import RunFolder, intact, sealed
from evaluation.behaviours import DEMONSTRATION, HELD_OUT_SPLITS, counterparts, load_behaviours
from geometry.activations import Gathering
from geometry.directions import best_layers
from geometry.plane import Nulls, PromptInfo, displacement_nulls, points, require_one_frame
from pipeline.contrast_reading import rendered
from pipeline.directions_files import directions_path, load_directions
from pipeline.plain import add_plain_requests
from pipeline.plane_files import export
from pipeline.runs import artifacts_of, check_specs, each_replay, first_replies, write_rows
from pipeline.trajectories import trajectory_rows
from plots import plane_html, plane_png, trajectories_png

STAGE, NOTE = "plane", "plane.json"
TRAJECTORIES = "plane_trajectories.jsonl"


@dataclass(frozen=True)
class PlaneConfig:
    """What is projected, and in which frame.

    ``base`` is the model of the base frame, the first target if None. ``layer`` is the base model's
    best if None. ``anchors`` are plain prompts that are drawn beside the attacks. ``position`` is
    where harmfulness is read.
    """

    base: str | None = None
    estimator: str = "harc"
    layer: int | None = None
    anchors: str = DEMONSTRATION
    anchor_splits: tuple[str, ...] = HELD_OUT_SPLITS
    position: str = "t_inst"


@dataclass(frozen=True)
class PlaneReading:
    """What one target read: residuals of all prompts, and of the wrappers' counterparts.

    ``infos`` are those of the first rows of ``activations``; ``wrappers``: prompt -> (the same
    wrapper with the matched harmless request in it, that request plain), as numbers of rows.
    """

    activations: Activations
    infos: list[PromptInfo]
    wrappers: dict[int, tuple[int, int]]


@dataclass
class PlaneResult:
    """The files written, and what the reader should know."""

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plane(
    path: Path,
    targets: Sequence[str],
    config: PlaneConfig,
    *,
    open_model: OpenModel = ModelHandle,
) -> PlaneResult:
    """Project the run's prompts and the anchors on every target, export and draw.

    Without ``targets``: every target that the run has replays on.
    """
    with RunFolder.existing(path) as run:
        stage = PlaneStage(run, targets, config)
        models = [open_model(spec) for spec in stage.targets]
        if not stage.is_done(models):
            for model in models:
                stage.read(model, [stage.layer])
                model.release()
            stage.write(models)
        return stage.result


class PlaneStage:
    """The stage within one run folder: its prompts, directions and settings."""

    def __init__(self, run: RunFolder, targets: Sequence[str], config: PlaneConfig) -> None:
        self.run, self.config, self.result = run, config, PlaneResult()
        add_plain_requests(run)  # displacements are measured from them
        self.artifacts = artifacts_of(run)
        replayed = dict.fromkeys(r.target_model for r in each_replay(run))
        self.targets = list(targets or (spec for spec in replayed if not is_served(spec)))
        if not self.targets:
            raise AttackPlaneError(
                "no targets", where=run.path, remedy="name some, or replay on some first"
            )
        self.base = config.base or self.targets[0]
        check_specs([*self.targets, self.base])
        self.anchors = load_behaviours(config.anchors, splits=config.anchor_splits)
        run.note_behaviours(self.anchors)
        self.matched = counterparts([*self.anchors, *run.behaviours().values()])
        self.infos = prompt_infos(run, self.artifacts, self.anchors)
        self.points: list[PlanePoint] = []
        self.nulls: Nulls = {}
        self.trajectories: list[Row] = []

    def _directions(self, spec: str) -> Directions:
        return load_directions(self.run.path, spec, self.config.estimator)

    @cached_property
    def frame(self) -> Directions:
        """Directions of the base frame."""
        return self._directions(self.base)

    @property
    def layer(self) -> int:
        chosen = self.config.layer
        return best_layers(self.frame)[0] if chosen is None else chosen

    # --- what there is already --------------------------------------------------------------------
    def made_from(self, models: Sequence[ModelHandle]) -> str:
        """Stands for all that the files depend on; needs no weights."""
        files = [directions_path(self.run.path, m.spec, self.config.estimator) for m in models]
        files.append(directions_path(self.run.path, self.base, self.config.estimator))
        notes = [
            read_object(f.with_suffix(".json"), "a note on directions", remedy=ANEW)
            for f in files
            if f.exists()
        ]
        replies = hashlib.sha256()  # of a million there may be
        for r in each_replay(self.run):
            replies.update(f"{r.replay_id} {r.jailbroken}\n".encode())
        return content_hash(
            [
                asdict(self.config),
                self.targets,
                [m.fingerprint for m in models],
                [note.get("made_from") for note in notes],
                [a.artifact_id for a in self.artifacts],
                replies.hexdigest(),
                [b.request for b in self.anchors],
            ]
        )

    def is_done(self, models: Sequence[ModelHandle]) -> bool:
        """Whether the run holds this very plane; then its files are the result."""
        if not all(m.known_fingerprint() for m in models):
            return False  # a model of the hub that is not here yet
        path = self.run.path / NOTE
        note = read_object(path, "a note on a plane", remedy=ANEW) if path.exists() else {}
        if not intact(note) or note["made_from"] != self.made_from(models):
            return False
        files = [self.run.path / name for name in note["files"]]
        if {f.name: _hash_of(f) for f in files if f.is_file()} != note["files"]:
            return False
        self.result.files, self.result.notes = files, note["notes"]
        return True

    # --- work -------------------------------------------------------------------------------------
    def read(self, model: ModelHandle, layers: Sequence[int] | None = None) -> PlaneReading:
        """Project everything on one target, in both frames; keep these residual layers, or all."""
        spec, own = model.spec, self._directions(model.spec)
        base, layer, position = self.frame, self.layer, self.config.position
        require_one_frame(own, base, layer)
        self._begin(model)
        renderer, rows = Renderer(model.loaded), Gathering(model.loaded, layers=layers)
        infos = self._rendered(renderer, rows)
        replies = first_replies(self.run)
        verdicts = {r.artifact_id: r.jailbroken for r in replies if r.target_model == spec}
        judged = [replace(i, jailbroken=verdicts.get(i.prompt_id)) for i in infos]
        wrappers = self._counterparts(renderer, rows, infos)
        activations = rows.activations()
        found = points(activations, judged, own, base, layer, position=position, wrappers=wrappers)
        if len(found) < 2 * len(judged):
            lacking = len(judged) - len(found) // 2
            self._note(f"{lacking} prompts do not hold their request: no point at {position}")
        self.points += found
        self.nulls |= displacement_nulls(activations, judged, own, base, layer, position=position)
        frames = {"base": base, "own": own}
        self.trajectories += trajectory_rows(renderer, self.artifacts, frames, layer)
        return PlaneReading(activations, judged, wrappers)

    def _counterparts(
        self, renderer: Renderer, rows: Gathering, infos: Sequence[PromptInfo]
    ) -> dict[int, tuple[int, int]]:
        """Add the wrappers of attacks with matched harmless requests in them, and those requests.

        Returns prompt -> (its wrapper, that request), as numbers of rows.
        """
        plain: dict[tuple[str, str | None], int] = {}
        wrappers: dict[int, tuple[int, int]] = {}
        by_id = {a.artifact_id: a for a in self.artifacts}

        def prompt_of(content: str, request: str, a: AttackArtifact, suffix: str | None) -> Prompt:
            conversation = Conversation.of_prompt(
                content, request=request, suffix=suffix, system=a.system_prompt
            )
            return renderer.render(conversation, allow_trim=True)

        for n, info in enumerate(infos):
            a = by_id.get(info.prompt_id)
            other = self.matched.get(info.behaviour_id)
            content = a.with_request(other.request) if a and other else None
            if not (a and other and content) or info.attack == PLAIN:
                continue
            key = other.request, a.system_prompt
            try:
                wrapped = prompt_of(content, other.request, a, a.suffix)
                bare = None if key in plain else prompt_of(other.request, other.request, a, None)
            except AttackPlaneError as error:
                self._note(f"no counterpart of {a.attack} {a.behaviour_id}: {error}")
                continue
            row = rows.add(wrapped, "counterpart")
            if bare:
                plain[key] = rows.add(bare, "counterpart")
            wrappers[n] = row, plain[key]
        return wrappers

    def _begin(self, model: ModelHandle) -> None:
        settings = {**asdict(self.config), "base": self.base, "layer": self.layer}
        settings |= {"targets": self.targets}
        self.run.begin_stage(STAGE, settings, {model.spec: model.fingerprint}, derived=True)

    def _rendered(self, renderer: Renderer, rows: Gathering) -> list[PromptInfo]:
        """Add anchors and attacked prompts as one target reads them; a refused one is noted."""
        system = self.frame.settings.get("system_prompt")
        other = "note: directions and attacks have different system prompts; part of a point is"
        if any(a.system_prompt != system for a in self.artifacts):
            self._note(f"{other} the system prompt")
        if self.frame.settings.get("template", "chat") != "chat":
            self._note(
                "note: directions were read without the template's own system text, attacks with "
                "it; part of a point is that text"
            )
        infos = self.infos[: len(self.anchors)]
        for prompt, info in zip(rendered(renderer, self.anchors, system), infos, strict=True):
            rows.add(prompt, info.prompt_id)
        for a, info in zip(self.artifacts, self.infos[len(self.anchors) :], strict=True):
            conversation = Conversation.of_prompt(
                a.prompt, request=a.request, suffix=a.suffix, system=a.system_prompt
            )
            try:
                prompt = renderer.render(conversation, allow_trim=True)
            except AttackPlaneError as error:
                what = f"{a.attack} {a.behaviour_id}"
                self._note(f"not on the plane of {renderer.loaded.spec}: {what}. {error}")
            else:
                rows.add(prompt, info.prompt_id)
                infos.append(info)
        return infos

    def _note(self, text: str) -> None:
        if text not in self.result.notes:
            self.result.notes.append(text)

    def write(self, models: Sequence[ModelHandle]) -> None:
        """Export and draw what was read."""
        folder, made_from = self.run.path, self.made_from(models)
        (folder / NOTE).unlink(missing_ok=True)  # until all files are there, there is no plane
        self.artifacts, self.infos = [], []  # of 100,000 prompts they are 300 MB
        files = export(self.points, folder, self.nulls)
        self.points = []
        trajectories = write_rows(folder / TRAJECTORIES, self.trajectories)
        files += [plane_png.draw(folder), plane_html.draw(folder)]
        (folder / trajectories_png.NAME).unlink(missing_ok=True)
        if self.trajectories:
            files += [trajectories, trajectories_png.draw(folder)]
        self.result.files = files
        note = {
            "made_from": made_from,
            "files": {file.name: _hash_of(file) for file in files},
            "notes": self.result.notes,
        }
        write_atomically(folder / NOTE, json.dumps(sealed(note), indent=2) + "\n")


def _hash_of(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def prompt_infos(
    run: RunFolder, artifacts: Sequence[AttackArtifact], anchors: Sequence[Behaviour]
) -> list[PromptInfo]:
    """What the plane says about each prompt, anchors first; verdicts come target by target."""
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
    for a in artifacts:
        name = a.attack
        if len(sources[a.attack]) > 1:
            name += f" from {short_spec(a.source_model)}"
        label = labels.get(a.behaviour_id, HARMFUL)
        if label != HARMFUL:  # never pooled with attacks on harmful requests
            name += f", {label}"
        infos.append(
            PromptInfo(
                prompt_id=a.artifact_id,
                behaviour_id=a.behaviour_id,
                kind="attack",
                class_name=name,
                label=label,
                attack=a.attack,
                source=a.source_model,
                jailbroken=None,
                system=a.system_prompt,
            )
        )
    return infos
