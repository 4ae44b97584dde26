"""Do a sweep: attacks on each source, imports, then transfer, directions, plane and pictures.

What is there already is not made again. A cell that fails is written into ``failures.jsonl`` with
its reason, shown as missing in the matrix, and tried again by the same command.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from core.errors import AttackPlaneError
from core.models import ModelHandle, OpenModel
from core.progress import bar as progress_bar
from core.records import NO_SOURCE, AttackArtifact, Behaviour
from core.specs import parse_spec
from core.store import ATTACKS, FAILURES, RunFolder
from interchange.foreign import Hints
from interchange.importer import ImportResult, import_file
from pipeline.campaign import Cells, Plan, make_bench
from pipeline.directions import begin_directions, directions
from pipeline.matrices import MATRIX, error_notes, labels_of, write_matrix
from pipeline.plane import plane
from pipeline.runs import each_replay, write_rows
from pipeline.sweep.config import SweepConfig, behaviours_of
from pipeline.sweep.plan import Part, Step, attack_steps, total_seconds
from pipeline.sweep.shards import Holds, Shard
from pipeline.transfer import Transfer, length_notes
from transfer.agreement import Agreement, agreements
from transfer.matrix import Cell

log = logging.getLogger(__name__)


@dataclass
class SweepResult:
    """What a sweep gave. ``failures`` are the cells that could not be made, with their reasons."""

    matrix: list[Cell] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    imports: dict[str, ImportResult] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    has_plane: bool = False


def sweep(
    config: SweepConfig,
    parts: Sequence[Part],
    *,
    open_model: OpenModel = ModelHandle,
    shard: Shard | None = None,
    make: Callable[..., Sweep] | None = None,
) -> SweepResult:
    """Do what is missing of a sweep; ``parts`` is its plan, for the progress bar.

    Args:
        shard: only its prompts and their replies are made; the config names its run folder.
        make: another way to do it, such as a cluster's (``cluster_sweep.py``).
    """
    path, result = Path(config.run), SweepResult()
    with Progress(parts) as progress:
        with RunFolder(path) as run:
            begin_directions(run, config.directions)  # a refusal comes before hours of work
            if shard:
                shard.mark(path)
            work = (make or Sweep)(config, run, open_model, progress, result, shard)
            work.attack()
            work.import_prompts()
            work.replay()
            result.matrix = write_matrix(run, [parse_spec(spec).text for spec in config.targets])
            result.agreements = agreements(each_replay(run), labels_of(run))
        if config.targets_here and not shard:
            work.plane()
    work.failures.close()
    result.failures = work.failures.rows
    result.files = [path / MATRIX, *result.files]
    return result


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class Failures:
    """Cells that failed, with their reason. A cell's row stays until all have been tried again."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.rows: list[dict[str, str]] = []

    def note(self, stage: str, error: Exception, **cell: str) -> None:
        self.add({"stage": stage, **cell, "reason": reason_of(error)})

    def add(self, row: dict[str, str]) -> None:
        self.rows.append(row)
        self.run.append(FAILURES, row)
        cell = ", ".join(value for key, value in row.items() if key != "reason")
        log.warning("failed: %s; %s", cell, row["reason"][:200])

    @contextmanager
    def guard(self, stage: str, **cell: str) -> Iterator[None]:
        """Note what fails inside instead of stopping the sweep."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever it was, the other cells go on
            self.note(stage, error, **cell)

    def close(self) -> None:
        """All cells have been tried: what failed now is what is left."""
        write_rows(self.run.path / FAILURES, self.rows)


class Progress:
    """One bar over the whole sweep, in per cent of the estimated time; stages' bars below it."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.seconds = {(part.what, part.source): part.seconds for part in parts}
        self.bar = progress_bar(
            round(total_seconds(parts)),
            "sweep",
            "s",
            leave=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} left",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def done(self, what: str, source: str) -> None:
        """A part of the plan is done."""
        seconds = self.seconds.pop((what, source), 0.0)
        self.bar.update(min(seconds, self.bar.total - self.bar.n))


@dataclass
class Sweep:
    """The parts of a sweep within its run folder."""

    config: SweepConfig
    run: RunFolder
    open_model: OpenModel
    progress: Progress
    result: SweepResult
    shard: Holds | None = None

    def __post_init__(self) -> None:
        self.behaviours = behaviours_of(self.config)
        self.failures = Failures(self.run)

    def attack(self) -> None:
        """Every attack on every source, then those that need none."""
        for spec in self.config.sources:
            self._attack_on(spec)
        for step in attack_steps(self.config, with_source=False):
            self.attack_with(step, ())

    def _attack_on(self, spec: str) -> None:
        """All attacks of one source, whose model is let go when this returns."""
        steps = attack_steps(self.config, with_source=True)
        try:
            source = self.open_model(spec)
            if any(self._lacks(step, source) for step in steps):
                source.loaded  # noqa: B018  a model that cannot be loaded fails here, once
        except Exception as error:  # noqa: BLE001  no attack of this source can be tried
            self.source_failed(spec, error)
            return
        for step in steps:
            self.attack_with(step, (source,))

    def source_failed(self, spec: str, error: Exception) -> None:
        for behaviour in self.behaviours:
            cell = {"attack": "all", "source": spec, "behaviour": behaviour.behaviour_id}
            self.failures.note("attack", error, **cell)

    def _cells(self, step: Step, sources: tuple[ModelHandle, ...]) -> Cells:
        plan = Plan(*step, sources)
        seed, open_model = self.config.seed, self.open_model
        return Cells(self.run, plan, make_bench(self.run, plan, self.behaviours, seed, open_model))

    def _lacks(self, step: Step, source: ModelHandle) -> bool:
        """Whether the run lacks something of an attack, or that cannot be told."""
        cells = self._cells(step, (source,))
        try:
            done = self.have(ATTACKS, "artifact_id")
            return bool(cells.missing(self._mine(cells, cells.fitting()), done))
        except AttackPlaneError:
            return True

    def have(self, file: str, key: str) -> set[str]:
        """Ids that the run holds."""
        return set(self.run.each_id(file, key))

    def _mine(self, cells: Cells, behaviours: Sequence[Behaviour]) -> list[Behaviour]:
        """The behaviours whose prompts fall to this shard: all of them, where there is none.

        An attack that optimises for several requests at once is one cell.
        """
        shard = self.shard
        if shard is None or not behaviours:
            return list(behaviours)
        if cells.plan.attack.sources == "several":
            return list(behaviours) if shard.holds(cells.ids(behaviours[0])[0]) else []
        return [b for b in behaviours if shard.holds(cells.ids(b)[0])]

    def attack_with(self, step: Step, sources: tuple[ModelHandle, ...]) -> None:
        cells = self.begun(step, sources)
        if cells and (mine := self._mine(cells, self.fitting(cells))):
            cells.attack(mine, on_failure=partial(self._attack_failed, cells))
        for name in self._names(cells) if cells and step[0].command else [step[0].name]:
            self.progress.done(name, sources[0].spec if sources else NO_SOURCE)

    def begun(self, step: Step, sources: tuple[ModelHandle, ...]) -> Cells | None:
        """An attack's cells, its settings written into the manifest; None where it cannot be tried.

        Raises:
            AttackPlaneError: another configuration of it in the same run is the user's to settle.
        """
        attack, config = step
        cells = self._cells(step, sources)
        names = [attack.name]
        try:
            names = self._names(cells)
            for name in names:
                cells.identity(name)
            attack.check(cells.bench, config)
        except Exception as error:  # noqa: BLE001  no cell of this attack can be tried
            source = sources[0].spec if sources else NO_SOURCE
            for behaviour in self.behaviours:
                cell = {"attack": names[0], "source": source, "behaviour": behaviour.behaviour_id}
                self.failures.note("attack", error, **cell)
            return None
        cells.begin()
        return cells

    def _names(self, cells: Cells) -> list[str]:
        return list(dict.fromkeys(name for b in self.behaviours for name, _ in cells.keys(b)))

    def fitting(self, cells: Cells) -> list[Behaviour]:
        """The behaviours that an attack can be tried on; the others are failures."""
        fit = cells.fitting()
        cells.done = dict.fromkeys(self.have(ATTACKS, "artifact_id"))
        for behaviour in self.behaviours:
            if behaviour not in fit:
                self._attack_failed(cells, behaviour, AttackPlaneError("no target string"))
        return fit

    def _attack_failed(self, cells: Cells, behaviour: Behaviour, error: Exception) -> None:
        """Note what lacks of a behaviour, cell by cell."""
        sources = cells.plan.sources
        for name, variant in cells.keys(behaviour):
            if cells.artifact_id(behaviour, (name, variant)) not in cells.done:
                cell = {"attack": name, "source": sources[0].spec if sources else NO_SOURCE}
                cell |= {"behaviour": behaviour.behaviour_id}
                cell |= {"variant": variant} if variant else {}
                self.failures.note("attack", error, **cell)

    def import_prompts(self) -> None:
        for choice in self.config.imports:
            with self.failures.guard("import", file=choice.file, format=choice.format):
                hints = Hints(choice.request, choice.model, choice.attack, choice.target_string)
                self.result.imports[choice.file] = import_file(
                    self.run,
                    Path(choice.file),
                    choice.format,
                    hints,
                    behaviours=list(self.behaviours),
                    only_these=True,
                    keep=self.shard.holds if self.shard else None,
                )

    def replay(self) -> None:
        whole = self.shard is None
        stage = Transfer(self.run, self.config.judges, self.config.replay, add_plain=whole)
        self.note_replays(stage)
        for spec in self.config.targets:
            with self.failures.guard("replay", target=spec):
                stage.replay_on(self.open_model(spec), self._not_sent(spec))
            self.progress.done("replays", spec)

    def note_replays(self, stage: Transfer) -> None:
        self.result.notes += length_notes(stage.artifacts, self.config.replay)
        self.result.notes += error_notes(self.run)

    def plane(self) -> None:
        """Directions and plane of the targets whose weights are here."""
        config, path, open_model = self.config, self.run.path, self.open_model
        targets = config.targets_here
        with self.failures.guard("plane", targets=", ".join(targets)):
            estimators = (config.plane.estimator,)
            models = config.read_models
            read = directions(path, models, estimators, config.directions, open_model=open_model)
            drawn = plane(path, targets, config.plane_config, open_model=open_model)
            self.result.notes += [*read.notes, *drawn.notes]
            self.result.files, self.result.has_plane = drawn.files, True
        for spec in targets:
            self.progress.done("directions, plane", spec)

    def _not_sent(self, target: str) -> Callable[[AttackArtifact, Exception], None]:
        def note(artifact: AttackArtifact, error: Exception, target: str) -> None:
            self.failures.note("replay", error, artifact=artifact.artifact_id, target=target)

        return partial(note, target=target)
