"""Attacks on behaviours, into a run folder: artifacts saved as soon as they are made, resume, ids.

An attack of ``attacks/`` knows neither run folders nor ids. Here:

1. Each prompt that a plan would make gets an id: a hash of attack, request, target, source model,
   settings and seed. What the run folder has already is not made again, and where nothing is
   missing no weights are loaded.
2. The settings go into the run's manifest; other settings of the same attack are refused there.
3. Every result becomes an artifact, one line of ``attacks.jsonl``, as soon as it is made. A search
   in progress is saved in between and goes on to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from attacks.registry import ATTACKS, Attack, Config, Key, sources_hash
from attacks.result import AttackResult
from attacks.workbench import Progress, Task, Workbench
from core.errors import AttackPlaneError
from core.models import ModelHandle, OpenModel
from core.progress import bar as progress_bar
from core.records import PLAIN, AttackArtifact, Behaviour, content_hash
from core.rows import Row
from core.store import ATTACKS as ATTACKS_FILE
from core.store import RunFolder, id_in
from core.tracking import track
from pipeline.runs import check_specs, each_artifact

OnFailure = Callable[[Behaviour, Exception], None]


@dataclass(frozen=True)
class Plan:
    """One attack with its settings on its source models. ``save_every``: None is the attack's."""

    attack: Attack
    config: Config
    sources: tuple[ModelHandle, ...] = ()
    save_every: int | None = None


@dataclass
class CampaignResult:
    """Artifacts of all plans, those of earlier runs included, and what the user should know."""

    artifacts: list[AttackArtifact] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def baseline_plans(plan: Plan) -> list[Plan]:
    """What a plan's attack is compared with, on the same source models, one by one."""
    plans = []
    for name, config in plan.attack.baselines(plan.config):
        attack = ATTACKS.get(name)
        if attack.sources == "none":
            plans.append(Plan(attack, config))
        else:
            plans += [Plan(attack, config, (source,)) for source in plan.sources]
    return plans


def campaign(
    path: Path,
    behaviours: Sequence[Behaviour],
    plans: Sequence[Plan],
    *,
    seed: int = 0,
    open_model: OpenModel = ModelHandle,
) -> CampaignResult:
    """Run the plans one after another in one run folder.

    Requests without a target string are left out of baselines that need one, and told of.

    Raises:
        AttackPlaneError: the run folder holds other settings of the same attack; a request without
            a target string for an attack that needs one; whatever an attack cannot do.
    """
    result = CampaignResult()
    with RunFolder(path) as run:
        benches = [make_bench(run, plan, behaviours, seed, open_model) for plan in plans]
        cells = [Cells(run, plan, bench) for plan, bench in zip(plans, benches, strict=True)]
        for cell in reversed(cells):  # all refusals before any work, the attack's own first
            cell.begin()
        for cell in cells:
            wanted = _without_plain(run, cell)
            fit = [b for b in cell.fitting() if b in wanted]
            if not cell.plan.attack.command and len(fit) < len(wanted):
                missing = len(wanted) - len(fit)
                name = cell.plan.attack.name
                result.notes.append(f"{missing} requests without a target string get no {name}")
            else:
                fit = wanted
            result.artifacts += cell.attack(fit)
    return result


def _without_plain(run: RunFolder, cell: Cells) -> list[Behaviour]:
    """Of a plan's behaviours those that it should make prompts for.

    A plain request without a source is made only where the run has none of that request under that
    system prompt; one from a source serves too.
    """
    if cell.plan.attack.name != PLAIN:
        return list(cell.bench.behaviours)
    own = {i for b in cell.bench.behaviours for i in cell.ids(b)}
    have = {
        artifact.request
        for artifact in each_artifact(run)
        if artifact.attack == PLAIN
        and artifact.artifact_id not in own
        and artifact.system_prompt == cell.plan.config.system_prompt
    }
    return [b for b in cell.bench.behaviours if b.request not in have]


def make_bench(
    run: RunFolder, plan: Plan, behaviours: Sequence[Behaviour], seed: int, open_model: OpenModel
) -> Workbench:
    """A workbench whose searches in progress are kept in the run folder."""
    return Workbench(plan.sources, behaviours, seed, RunStates(run), open_model)


class RunStates:
    """Searches in progress, in a run folder."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def load(self, name: str) -> Row | None:
        return self._run.load_state(name)

    def save(self, name: str, state: Callable[[], Row]) -> None:
        self._run.save_state(name, state())

    def drop(self, name: str) -> None:
        self._run.drop_state(name)


class Cells:
    """One plan over any number of behaviours in one run folder: a cell is one prompt of it."""

    def __init__(self, run: RunFolder, plan: Plan, bench: Workbench) -> None:
        self.run, self.plan, self.bench = run, plan, bench
        self.done: Row = {}
        """The run's prompts by id, while they are added to."""

    @property
    def name(self) -> str:
        return self.plan.attack.name

    # --- what it would make -----------------------------------------------------------------------
    def keys(self, behaviour: Behaviour) -> Sequence[Key]:
        return self.plan.attack.keys_of(self.plan.config, behaviour, self.bench)

    def identity(self, name: str) -> Row:
        """What the artifacts of one name depend on, besides request, source model and seed."""
        return self.bench.once(
            ("identity", name),
            lambda: self.plan.attack.identity(self.bench, self.plan.config, name),
        )

    def artifact_id(self, behaviour: Behaviour, key: Key) -> str:
        name, variant = key
        about: list[Any] = [name, behaviour.request, behaviour.target_string]
        for source in self.plan.sources[:1]:
            about += [source.spec, source.fingerprint]
        about += [self.identity(name), self.bench.seed, *([variant] if variant else [])]
        own = content_hash(about)
        if self.plan.attack.sources != "several":
            return own
        return content_hash([own, sources_hash(self.plan.sources)])

    def ids(self, behaviour: Behaviour) -> list[str]:
        return [self.artifact_id(behaviour, key) for key in self.keys(behaviour)]

    def missing(self, behaviours: Sequence[Behaviour], done: Collection[str]) -> list[Behaviour]:
        """Behaviours that lack an artifact, given the ids that the run holds."""
        return [b for b in behaviours if not all(i in done for i in self.ids(b))]

    def fitting(self) -> list[Behaviour]:
        """The behaviours that have what the attack needs."""
        needs = self.plan.attack.needs_target
        return [b for b in self.bench.behaviours if b.target_string or not needs]

    # --- work -------------------------------------------------------------------------------------
    def begin(self) -> None:
        """Check the plan, and write its settings and models into the run's manifest."""
        sources = {"none": 0, "one": 1}.get(self.plan.attack.sources)
        count = len(self.plan.sources)
        if (sources is not None and sources != count) or (sources is None and not count):
            raise AttackPlaneError(
                f"{self.name} takes {self.plan.attack.sources} source models",
                where="campaign",
                got=f"{count} source models",
            )
        if self.plan.attack.reads_weights:
            check_specs([source.spec for source in self.plan.sources])
        self.plan.attack.check(self.bench, self.plan.config)
        behaviours = self.bench.behaviours
        names = dict.fromkeys(name for b in behaviours for name, _ in self.keys(b))
        for name in names:
            settings = {**self.identity(name), "seed": self.bench.seed}
            models = [*self.plan.sources, *self.bench.used.values()]
            self.run.begin_stage(
                name,
                settings,
                {m.spec: m.fingerprint for m in models},
                empty=partial(self._made_none, name),
            )

    def _made_none(self, name: str) -> bool:
        """Whether the run has no prompt of this name, and no search in progress."""
        rows = self.run.each_row(ATTACKS_FILE)
        return not any((self.run.path / "state").glob("*.json")) and all(
            row.get("attack") != name for _, row in rows
        )

    def attack(
        self, behaviours: Sequence[Behaviour], on_failure: OnFailure | None = None
    ) -> list[AttackArtifact]:
        """Artifacts of the behaviours, those of earlier runs included.

        With ``on_failure`` a behaviour that fails is told to it and the others go on.
        """
        attack = self.plan.attack
        lacking = [b for b in behaviours if attack.needs_target and not b.target_string]
        if lacking:
            raise AttackPlaneError(
                f"{attack.name} needs a target string for every behaviour",
                where=f"{len(lacking)} behaviours, first {lacking[0].behaviour_id}",
                remedy="add a column target ('Sure, here is ...') to the behaviours file",
            )
        self.run.note_behaviours(behaviours)
        done = self.done = {
            id_in(row, "artifact_id", f"{self.run.path / ATTACKS_FILE}, line {line}"): row
            for line, row in self.run.each_row(ATTACKS_FILE)
        }
        missing = self.missing(behaviours, done)
        steps = attack.steps(self.plan.config)
        bar = progress_bar(
            len(behaviours) * steps,
            attack.name,
            attack.unit,
            disable=None if missing else True,
            leave=None,
            initial=(len(behaviours) - len(missing)) * steps,
        )
        failed = False
        with bar, self.bench:
            for behaviour in behaviours:
                if behaviour in missing:
                    start = bar.n
                    try:
                        self._attack_one(behaviour, bar, done)
                    except Exception as error:
                        if on_failure is None:
                            raise
                        failed = True
                        on_failure(behaviour, error)
                        continue
                    bar.update(start + steps - bar.n)  # a search may stop early
                for name in self.ids(behaviour):  # also left by a crash right after saving
                    self.run.drop_state(name)
            if not failed:  # else what a search has saved is needed again
                attack.finish(self.bench, self.plan.config)
        wanted = [i for b in behaviours for i in self.ids(b)]
        return [AttackArtifact.from_row(done[i]) for i in wanted if i in done]

    def _attack_one(self, behaviour: Behaviour, bar: Any, done: Row) -> None:
        """Make what lacks of one behaviour, and append it to the run."""
        start, steps = bar.n, self.plan.attack.steps(self.plan.config)

        def on_step(progress: Progress) -> None:
            if progress.steps == steps:  # else it is one of several units, such as a shared suffix
                bar.update(start + progress.step - bar.n)
            series = f"{self.name}/{behaviour.behaviour_id}"
            track(series, progress.step, {"loss": progress.loss, "best": progress.best})
            text = f"{behaviour.behaviour_id} step {progress.step} of {progress.steps}"
            bar.set_postfix_str(f"{text} loss {progress.loss:.3f} best {progress.best:.3f}")

        save_every = self.plan.save_every or self.plan.attack.save_every or 1
        there = [k for k in self.keys(behaviour) if self.artifact_id(behaviour, k) in done]
        task = Task(behaviour, self.ids(behaviour)[0], save_every, on_step, frozenset(there))
        for result in self.plan.attack.run(self.bench, task, self.plan.config):
            artifact = self.artifact_of(behaviour, result)
            if artifact.artifact_id not in done:
                row = artifact.to_row()
                self.run.append(ATTACKS_FILE, row)
                done[artifact.artifact_id] = row

    def artifact_of(self, behaviour: Behaviour, result: AttackResult) -> AttackArtifact:
        """A result with its identity."""
        key = (result.attack, result.variant)
        return AttackArtifact(
            artifact_id=self.artifact_id(behaviour, key),
            behaviour_id=behaviour.behaviour_id,
            seed=self.bench.seed,
            config_hash=content_hash(self.identity(result.attack)),
            **result.to_row(),
        )
