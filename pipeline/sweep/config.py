"""A sweep's TOML file, read and checked: behaviours x attacks x sources x targets.

run = "runs/classes"
sources = ["embedded"]                      # attacks that need a model are made on each
targets = ["embedded", "embedded+runs/demo/checkpoints/step-12"]    # http://HOST/v1#MODEL too
base = "embedded"                           # the plane's base frame [default: the first target]
judges = ["refusal_phrases", "target_prefix"]
seed = 0

[behaviours]                                # what gcg --behaviours, --label, --split, --limit take
set = "demonstration"
limit = 8

[attacks.gcg]                               # any attack of the registry, by name, with any setting
num_steps = 20
[attacks.autodan_ga]                        # or by the name of one of its forms
population = 16
[attacks.templates]
classes = ["persona", "past_tense"]
[[imports]]
format = "jailbreakbench"
file = "artifacts/GCG/white_box/vicuna-13b-v1.5.json"

[replay]                                    # max_new_tokens, temperature, seed
[directions]                                # contrast, splits, resamples, judge
[plane]                                     # anchors, anchor_splits, estimator, layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attacks.registry import ATTACKS
from attacks.workbench import Workbench
from core.errors import AttackPlaneError, nearest
from core.files import require_possible
from core.records import LABELS, SPLITS, Behaviour
from core.rows import Row
from core.served import is_served
from core.settings import LARGEST, check_settings, setting
from evaluation.behaviours import (
    BUILT_IN,
    DEMONSTRATION,
    HELD_OUT_SPLITS,
    load_behaviours,
    reading_files,
    spread,
    to_attack,
)
from evaluation.judges import DEFAULT_JUDGES, judge_kind
from geometry.directions import ESTIMATORS
from interchange.readers import READERS
from pipeline.contrast_reading import DirectionsConfig, contrast_set
from pipeline.plane import PlaneConfig
from pipeline.runs import check_specs
from pipeline.toml_file import AttackChoice, attack_of, faults_of, read_toml, table_of
from transfer.replay import ReplayConfig


@dataclass(frozen=True)
class BehavioursChoice:
    """``splits``: None is the test split of the demonstration set, else all.

    ``every``: only each so many-th, before the limit: a small choice that spreads over a set that
    is sorted by category.
    """

    set: str = DEMONSTRATION
    label: str = setting("harmful", "Label, or any.", choices=(*LABELS, "any"))
    splits: tuple[str, ...] | None = None
    every: int = setting(1, "Only each so many-th.", low=1)
    limit: int | None = setting(None, "So many, spread over categories.", low=1)
    label_of_file: str | None = setting(None, "Label of rows without one.", choices=LABELS)

    def __post_init__(self) -> None:
        check_settings(self, "behaviours")
        for name in self.splits or ():
            if name not in SPLITS:
                raise AttackPlaneError(
                    "unknown split", where="splits", got=name, remedy=nearest(name, SPLITS)
                )


@dataclass(frozen=True)
class ImportChoice:
    """A file of another tool. Prompts of other behaviours are left out.

    ``model``, ``attack``, ``request`` and ``target_string`` say what the file does not.
    """

    format: str
    file: str
    model: str | None = None
    attack: str | None = None
    request: str | None = None
    target_string: str | None = None

    def __post_init__(self) -> None:
        if self.format not in READERS:
            remedy = nearest(self.format, [*READERS])
            raise AttackPlaneError("unknown format", got=self.format, remedy=remedy)
        if not Path(self.file).is_file():
            raise AttackPlaneError("no such file to import", where="imports", got=self.file)
        if self.format == "nanogcg" and not (self.request and self.model):
            raise AttackPlaneError(
                "a nanoGCG result needs request and model", where="imports", got=self.file
            )


@dataclass(frozen=True)
class PlaneChoice:
    anchors: str = DEMONSTRATION
    anchor_splits: tuple[str, ...] = HELD_OUT_SPLITS
    estimator: str = setting(ESTIMATORS[0], "Of the refusal direction.", choices=ESTIMATORS)
    layer: int | None = setting(None, "Residual layer [default: the base's best].", low=0)

    def __post_init__(self) -> None:
        check_settings(self, "plane")


@dataclass(frozen=True)
class SweepConfig:
    run: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    base: str | None = None
    judges: tuple[str, ...] = DEFAULT_JUDGES
    seed: int = setting(0, "Random seed.", low=0, high=LARGEST)
    behaviours: BehavioursChoice = BehavioursChoice()
    attacks: Mapping[str, AttackChoice] = field(default_factory=dict)
    imports: tuple[ImportChoice, ...] = ()
    replay: ReplayConfig = ReplayConfig()
    directions: DirectionsConfig = DirectionsConfig()
    plane: PlaneChoice = PlaneChoice()

    def __post_init__(self) -> None:
        check_settings(self, "sweep")
        if not self.run.strip() or not self.judges:
            raise AttackPlaneError("a sweep needs a run folder and a judge", where="run, judges")
        require_possible(Path(self.run))

    @property
    def plane_config(self) -> PlaneConfig:
        return PlaneConfig(base=self.base, **asdict(self.plane))

    @property
    def read_models(self) -> list[str]:
        """The targets whose weights are here, and before them the model of the base frame."""
        return list(dict.fromkeys([*([self.base] if self.base else []), *self.targets_here]))

    @property
    def calibrated(self) -> str:
        """The model that the plan's speed is measured on: one that is here, if any is."""
        specs = [*self.sources, *self.targets]
        return next((spec for spec in specs if not is_served(spec)), specs[0])

    @property
    def targets_here(self) -> list[str]:
        """The targets that are not served: only these have directions and a plane."""
        return [spec for spec in self.targets if not is_served(spec)]


TABLES: dict[str, type[Any]] = {
    "behaviours": BehavioursChoice,
    "replay": ReplayConfig,
    "directions": DirectionsConfig,
    "plane": PlaneChoice,
}


def read_config(path: Path) -> SweepConfig:
    """Read and check a sweep's file.

    Raises:
        AttackPlaneError: not TOML, an unknown key (the nearest known one is named), a bad value,
            spec, judge or file.
    """
    with faults_of(path):
        return _read(path)


def _read(path: Path) -> SweepConfig:
    values = read_toml(path, "sweep")
    where = str(path)
    for name, key, source in (
        ("directions", "splits", "contrast"),
        ("plane", "anchor_splits", "anchors"),
    ):
        table = values.get(name, {})
        chosen = table.get(source, DEMONSTRATION) if isinstance(table, dict) else None
        if isinstance(chosen, str) and chosen not in BUILT_IN:
            table.setdefault(key, [])  # the default splits are those of the built-in sets
    for name, cls in TABLES.items():
        if name in values:
            values[name] = table_of(cls, values[name], f"{where}, [{name}]")
    judges = values.get("judges", DEFAULT_JUDGES)
    judge = judges[0] if judges and isinstance(judges, (list, tuple)) else None
    tables = values.get("attacks", {})
    if not isinstance(tables, dict):
        raise AttackPlaneError("expected a table", where=f"{where}, [attacks]", got=repr(tables))
    values["attacks"] = {
        name: attack_of(name, table, f"{where}, [attacks.{name}]", judge)
        for name, table in tables.items()
    }
    imports = values.get("imports", [])
    if not isinstance(imports, list):
        raise AttackPlaneError("expected tables", where=f"{where}, [[imports]]", got=repr(imports))
    values["imports"] = [
        table_of(ImportChoice, row, f"{where}, [[imports]] {n}")
        for n, row in enumerate(imports, start=1)
    ]
    config: SweepConfig = table_of(SweepConfig, values, where)
    _check(config, where)
    return config


def _check(config: SweepConfig, where: str) -> None:
    """What concerns several tables."""
    need_source = [name for name, (a, _) in config.attacks.items() if a.sources != "none"]
    if not config.targets or (not config.sources and need_source):
        raise AttackPlaneError("no targets, or no sources for these attacks", where=where)
    if not config.attacks and not config.imports:
        raise AttackPlaneError("nothing to do: no attacks and no imports", where=where)
    _check_baselines(config, where)
    check_specs([*config.sources, *config.targets], served=True)
    check_specs(config.read_models)
    if any(attack.reads_weights for attack, _ in config.attacks.values()):
        check_specs(config.sources)
    contrast_set(config.directions)
    load_behaviours(config.plane.anchors, splits=config.plane.anchor_splits)
    for judge in [*config.judges, config.directions.judge]:
        judge_kind(judge)


def _check_baselines(config: SweepConfig, where: str) -> None:
    """One baseline must serve all attacks: the same seeds, suffix and system prompt."""
    bench, known = Workbench(), Row()
    for name, (attack, settings) in config.attacks.items():
        for baseline, own in attack.baselines(settings):
            chosen = ATTACKS.get(baseline)
            for key, _ in chosen.keys_of(own, SAMPLE, bench):
                identity = chosen.identity(bench, own, key)
                if known.setdefault(key, identity) != identity:
                    raise AttackPlaneError(
                        f"the attacks start from different settings of their baseline {key}",
                        where=f"{where}, [attacks.{name}]",
                        got=f"{identity} and {known[key]}",
                        remedy="give the same to each, or sweep them one after another",
                    )


SAMPLE = Behaviour("sample", "a request", "a target", "none", "harmful", "none")
"""Stands for any request where only the names of what would be made are asked for."""


def behaviours_of(config: SweepConfig) -> list[Behaviour]:
    """The behaviours that are attacked."""
    choice = config.behaviours
    with reading_files(choice.label_of_file):
        behaviours = to_attack(choice.set, choice.label, choice.splits)
    return spread(behaviours[:: choice.every], choice.limit)
