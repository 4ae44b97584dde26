"""An experiment's TOML file, read and checked whole; every fault with its place."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError, nearest
from core.records import HARMFUL
from core.rows import Row
from core.specs import canonical_name, parse_spec
from core.typed import from_values
from evaluation.behaviours import load_held_out
from evaluation.budget import EvaluateConfig
from pipeline.toml_file import attack_of, faults_of, read_toml, table_of
from study.experiment import Experiment, Options, TrainingChoice
from training.registry import ARMS, SMALL_PRESET

CHOSEN = ("sources", "claims", "anchors")
"""Tables that name checkpoints."""
LONGEST_NAME = 100


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment's file.

    Raises:
        AttackPlaneError: not TOML, an unknown key (the nearest known one is named), a bad value, or
            a checkpoint that no training saves.
    """
    with faults_of(path):
        return _read(path)


def _read(path: Path) -> Experiment:
    values = read_toml(path, "experiment")
    where = str(path)
    trainings = values.get("trainings")
    if not isinstance(trainings, list) or not trainings:
        raise AttackPlaneError("no trainings", where=where, remedy="write [[trainings]] tables")
    values["trainings"] = tuple(
        _training(row, f"{where}, [[trainings]] {n}") for n, row in enumerate(trainings, start=1)
    )
    for name in ("attacks", "transfer"):
        values[name] = {
            key: attack_of(key, table, f"{where}, [{name}.{key}]")
            for key, table in _table(values, name, where).items()
        }
    for name in CHOSEN:
        values[name] = {
            key: tuple(steps) if isinstance(steps, list) else (steps,)
            for key, steps in _table(values, name, where).items()
        }
    for name, cls in (("evaluate", EvaluateConfig), ("options", Options)):
        values[name] = table_of(cls, _table(values, name, where), f"{where}, [{name}]")
    experiment: Experiment = table_of(Experiment, values, where)
    _check(experiment, where)
    return experiment


def _table(values: Row, name: str, where: str) -> Row:
    table = values.get(name, {})
    if not isinstance(table, dict):
        raise AttackPlaneError("expected a table", where=f"{where}, [{name}]", got=repr(table))
    return table


@dataclass(frozen=True)
class _Head:
    """What a training's table says besides the settings of its arm."""

    arm: str
    seeds: tuple[int, ...] = (0,)
    name: str = ""
    preset: str = SMALL_PRESET


def _training(row: Any, where: str) -> TrainingChoice:
    if not isinstance(row, dict):
        raise AttackPlaneError("expected a table", where=where, got=repr(row))
    own = {f.name for f in fields(_Head)}
    head = from_values(_Head, {k: v for k, v in row.items() if k in own}, where)
    if head.arm not in ARMS.all():
        remedy = nearest(head.arm, ARMS.all())
        raise AttackPlaneError("unknown training arm", where=where, got=head.arm, remedy=remedy)
    if head.name and (canonical_name(head.name) != head.name or len(head.name) > LONGEST_NAME):
        raise AttackPlaneError(
            "a name must do as a folder",
            where=where,
            got=repr(head.name)[:100],
            remedy=f"use letters, digits, - and _, at most {LONGEST_NAME}",
        )
    arm = ARMS.get(head.arm)
    settings = {k: v for k, v in row.items() if k not in own}
    config = arm.make_config(settings, preset=head.preset, where=where)
    if not head.seeds or len({*head.seeds}) < len(head.seeds):
        raise AttackPlaneError("seeds must be given, each once", where=where, got=head.seeds)
    for seed in head.seeds:
        replace(config, seed=seed)  # which checks it
    return TrainingChoice(arm.name, config, head.seeds, head.name)


def _check(experiment: Experiment, where: str) -> None:
    """What concerns several tables."""
    parse_spec(experiment.reference)
    names = [t.name or t.arm for t in experiment.trainings]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise AttackPlaneError(
            "two trainings of one name", where=where, got=twice, remedy='give one a name = "..."'
        )
    saved = {n: t.steps for n, t in zip(names, experiment.trainings, strict=True)}
    for table in CHOSEN:
        for name, steps in getattr(experiment, table).items():
            if len({*steps}) < len(steps):
                raise AttackPlaneError(
                    "a step that is given twice", where=f"{where}, [{table}] {name}", got=[*steps]
                )
            missing = [s for s in steps if s not in saved.get(name, ())]
            if missing:
                raise AttackPlaneError(
                    "no such checkpoint",
                    where=f"{where}, [{table}] {name}",
                    got=missing,
                    remedy=f"trainings save {saved}",
                )
    held_out = load_held_out(experiment.behaviours)
    there = sum(b.label == HARMFUL and bool(b.target_string) for b in held_out)
    for key in ("fixed_behaviours", "source_behaviours"):
        if getattr(experiment, key) > there:
            raise AttackPlaneError(
                "more behaviours than the set has",
                where=f"{where}, {key}",
                got=f"{getattr(experiment, key)}, held out with a target string: {there}",
                remedy=f"give at most {there}, or another set with behaviours = ...",
            )
    if experiment.sources and not experiment.transfer:
        raise AttackPlaneError("sources without attacks", where=where, remedy="add [transfer.gcg]")
