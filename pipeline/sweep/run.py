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
from pipeline.sweep.shards import Shard
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
) -> SweepResult:
    """Do what is missing of a sweep; ``parts`` is its plan, for the progress bar.

    With a ``shard`` only its prompts and their replies are made; the config names its run folder.
    """
    path, result = Path(config.run), SweepResult()
    with Progress(parts) as progress:
        with RunFolder(path) as run:
            begin_directions(run, config.directions)  # a refusal comes before hours of work
            if shard:
                shard.mark(path)
            work = Sweep(config, run, open_model, progress, result, shard)
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


class Failures:
    """Cells that failed, with their reason. A cell's row stays until all have been tried again."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.rows: list[dict[str, str]] = []

    def note(self, stage: str, error: Exception, **cell: str) -> None:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.rows.append({"stage": stage, **cell, "reason": reason})
        self.run.append(FAILURES, self.rows[-1])
        log.warning("%s failed: %s; %s", stage, ", ".join(cell.values()), reason[:200])

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
    shard: Shard | None = None

    def __post_init__(self) -> None:
        self.behaviours = behaviours_of(self.config)
        self.failures = Failures(self.run)

    def attack(self) -> None:
        """Every attack on every source, then those that need none."""
        for spec in self.config.sources:
            self._attack_on(spec)
        for step in attack_steps(self.config, with_source=False):
            self._attack_with(step, ())

    def _attack_on(self, spec: str) -> None:
        """All attacks of one source; its model is gone when this returns."""
        steps = attack_steps(self.config, with_source=True)
        try:
            source = self.open_model(spec)
            if any(self._lacks(step, source) for step in steps):
                source.loaded  # noqa: B018  a model that cannot be loaded fails here, once
        except Exception as error:  # noqa: BLE001  no attack of this source can be tried
            for behaviour in self.behaviours:
                cell = {"attack": "all", "source": spec, "behaviour": behaviour.behaviour_id}
                self.failures.note("attack", error, **cell)
            return
        for step in steps:
            self._attack_with(step, (source,))

    def _cells(self, step: Step, sources: tuple[ModelHandle, ...]) -> Cells:
        plan = Plan(*step, sources)
        seed, open_model = self.config.seed, self.open_model
        return Cells(self.run, plan, make_bench(self.run, plan, self.behaviours, seed, open_model))

    def _lacks(self, step: Step, source: ModelHandle) -> bool:
        """Whether the run lacks something of an attack, or that cannot be told."""
        cells = self._cells(step, (source,))
        try:
            done = set(self.run.each_id(ATTACKS, "artifact_id"))
            return bool(cells.missing(self._mine(cells, cells.fitting()), done))
        except AttackPlaneError:
            return True

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

    def _attack_with(self, step: Step, sources: tuple[ModelHandle, ...]) -> None:
        attack, config = step
        source = sources[0].spec if sources else NO_SOURCE
        cells = self._cells(step, sources)
        names = [attack.name]
        try:
            names = list(dict.fromkeys(n for b in self.behaviours for n, _ in cells.keys(b)))
            for name in names:
                cells.identity(name)
            attack.check(cells.bench, config)
        except Exception as error:  # noqa: BLE001  no cell of this attack can be tried
            for behaviour in self.behaviours:
                cell = {"attack": names[0], "source": source, "behaviour": behaviour.behaviour_id}
                self.failures.note("attack", error, **cell)
        else:
            cells.begin()  # another configuration in the same run is the user's to settle
            self._attack_all(cells, source)
        for name in names if attack.command else [attack.name]:
            self.progress.done(name, source)

    def _attack_all(self, cells: Cells, source: str) -> None:
        """One attack on all behaviours; what fails is noted cell by cell."""

        def failed(behaviour: Behaviour, error: Exception) -> None:
            for name, variant in cells.keys(behaviour):
                if cells.artifact_id(behaviour, (name, variant)) not in cells.done:
                    cell = {"attack": name, "source": source}
                    cell |= {"behaviour": behaviour.behaviour_id}
                    cell |= {"variant": variant} if variant else {}
                    self.failures.note("attack", error, **cell)

        fit = cells.fitting()
        cells.done = dict.fromkeys(self.run.each_id(ATTACKS, "artifact_id"))
        for behaviour in self.behaviours:
            if behaviour not in fit:
                failed(behaviour, AttackPlaneError("no target string"))
        if mine := self._mine(cells, fit):
            cells.attack(mine, on_failure=failed)

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
        self.result.notes += length_notes(stage.artifacts, self.config.replay)
        self.result.notes += error_notes(self.run)
        for spec in self.config.targets:
            with self.failures.guard("replay", target=spec):
                stage.replay_on(self.open_model(spec), self._not_sent(spec))
            self.progress.done("replays", spec)

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
