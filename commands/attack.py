"""Makes the command of an attack from its registry entry."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from attacks.registry import ATTACKS, Attack
from commands.options import (
    behaviour_options,
    chosen,
    chosen_preset,
    default_run,
    echo_notes,
    open_model,
    program,
    quiet_libraries,
)
from core.rows import Row
from core.settings import BELOW, CHOICES, FLAG, HELP, HIGH, LOW, default_of

COMMON = (
    *("run", "behaviours", "label", "splits", "limit", "preset", "seed"),
    *("save_every", "baselines", "models", "catalogue"),
)


def attack_command(name: str) -> click.Command:
    """The command of the attack ``name``."""
    attack = ATTACKS.get(name)

    def callback(**options: Any) -> None:
        common = {key: options.pop(key) for key in COMMON if key in options}
        run_attack(attack, common, options)

    command: Any = quiet_libraries(callback)
    for option in reversed([*_options(attack), *_setting_options(attack)]):
        command = option(command)
    examples = "".join(f"  python cli.py {example}\n" for example in attack.examples)
    text = f"{attack.summary}\n\nSaves each prompt as an artifact of the run, with what it is "
    text += "compared with; the same command goes on after a stop."
    if examples:
        text += f"\n\n\b\nExamples:\n{examples}"
    return click.command(name.replace("_", "-"), help=text)(command)


Decorator = Callable[..., Any]


def _options(attack: Attack) -> list[Decorator]:
    """Options that every attack has, as far as it needs them."""
    options: list[Decorator] = []
    if attack.sources != "none":
        several = attack.sources == "several"
        options.append(
            click.option(
                "--model",
                "models",
                multiple=several,
                default=("embedded",) if several else "embedded",
                help="Source model (a model spec)" + ("; repeatable." if several else "."),
            )
        )
    options.append(
        click.option(
            "--run",
            type=click.Path(path_type=Path),
            help="Run folder [default: runs/ATTACK-MODEL-HASH]",
        )
    )
    options.append(behaviour_options)
    if len(attack.presets) > 1:
        parts = [f"{name}: {_preset_text(attack, name)}" for name in attack.presets]
        options.append(
            click.option(
                "--preset",
                type=click.Choice(["auto", *attack.presets]),
                default="auto",
                help=". ".join([*parts, "auto: quick on a CPU."]),
            )
        )
    options.append(click.option("--seed", type=int, default=0))
    if attack.save_every:
        options.append(
            click.option(
                "--save-every",
                type=click.IntRange(1),
                default=attack.save_every,
                help="Steps between saves within a behaviour.",
            )
        )
    options.append(
        click.option(
            "--baselines/--no-baselines",
            default=True,
            help="Also save what the attack is compared with.",
        )
    )
    if attack.catalogue:
        listed = "List the classes, their sources and what ours lack."
        options.append(click.option("--list", "catalogue", is_flag=True, help=listed))
    return options


def _preset_text(attack: Attack, preset: str) -> str:
    """The settings in which a preset differs from another."""
    changed = {key for values in attack.presets.values() for key in values}
    config = attack.make_config({}, where="preset", preset=preset)
    fields = [f for f in dataclasses.fields(attack.config) if f.name in changed]
    return ", ".join(f"{flag_of(f).removeprefix('--')} {getattr(config, f.name)}" for f in fields)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The option of a setting."""
    return field.metadata.get(FLAG) or f"--{field.name.replace('_', '-')}"


def _setting_options(attack: Attack) -> list[Decorator]:
    """One option per field of the config."""
    hints = typing.get_type_hints(attack.config)
    changed = {key for values in attack.presets.values() for key in values}
    return [
        _setting_option(field, hints[field.name], field.name in changed)
        for field in dataclasses.fields(attack.config)
    ]


def _setting_option(field: dataclasses.Field[Any], hint: Any, by_preset: bool) -> Decorator:
    """A setting as an option; not given is None, and then the preset or the default holds."""
    kind, default = _plain(hint), default_of(field)
    text = field.metadata.get(HELP, "")
    if "[default:" not in text and default not in (None, (), {}) and kind is not bool:
        shown = ", ".join(default) if isinstance(default, tuple) else default
        text += " [default: by preset]" if by_preset else f" [default: {shown}]"
    options: Row = {"help": text, "default": None, "show_default": False}
    flag = flag_of(field)
    if kind is bool:
        return click.option(flag, field.name, is_flag=True, **options)
    if kind is dict:
        return click.option(flag, field.name, multiple=True, metavar="NAME=JSON", **options)
    if kind is tuple:
        choices = click.Choice(field.metadata.get(CHOICES, ()))
        options["metavar"] = "NAME"
        return click.option(flag, field.name, type=choices, multiple=True, **options)
    return click.option(flag, field.name, type=_type_of(kind, field.metadata), **options)


def _plain(hint: Any) -> type[Any]:
    """``int | None`` -> int, ``tuple[str, ...]`` -> tuple."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_origin(hint) or hint


def _type_of(kind: type[Any], metadata: Any) -> Any:
    if metadata.get(CHOICES):
        return click.Choice(metadata[CHOICES])
    if kind is int:
        return click.IntRange(metadata.get(LOW), metadata.get(HIGH))
    if kind is float:
        below = metadata.get(BELOW)
        high = metadata.get(HIGH) if below is None else below
        return click.FloatRange(metadata.get(LOW), high, max_open=below is not None)
    return str


def _json_pairs(pairs: tuple[str, ...]) -> Row:
    """``("buffer_size=4",)`` -> {"buffer_size": 4}."""
    values = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            values[name] = json.loads(value)
        except ValueError as error:
            example = "for example buffer_size=4"
            raise click.BadParameter(f"{pair!r}: expected NAME=JSON, {example}") from error
    return values


def given_settings(attack: Attack, options: Row) -> Row:
    """The settings that were given on the command line."""
    hints = typing.get_type_hints(attack.config)
    values = {}
    for name, value in options.items():
        if value is not None and value != ():
            values[name] = _json_pairs(value) if _plain(hints[name]) is dict else value
    return values


def run_attack(attack: Attack, common: Row, options: Row) -> None:
    """Attack the chosen behaviours, and print what came of it."""
    from commands.tables.attacks import attack_table, counts_line
    from pipeline.campaign import Plan, baseline_plans, campaign

    if common.get("catalogue") and attack.catalogue:
        for title, lines in attack.catalogue():
            click.echo("\n  ".join([title, *lines]))
        return
    preset = chosen_preset(common["preset"]) if "preset" in common else "paper"
    config = attack.make_config(given_settings(attack, options), where=attack.name, preset=preset)
    behaviours, count = chosen(*(common[k] for k in ("behaviours", "label", "splits", "limit")))
    models = common.get("models", ())
    models = (models,) if isinstance(models, str) else models
    about = [dataclasses.asdict(config), common["seed"], models]
    path = common["run"] or default_run(attack.name, " & ".join(models) or "none", about)
    steps = f", {attack.steps(config)} {attack.unit}s each" if attack.unit != "behaviour" else ""
    click.echo(f"{len(behaviours)} of {count} behaviours{steps} -> {path}")
    sources = tuple(open_model(spec) for spec in models)
    plan = Plan(attack, config, sources, common.get("save_every"))
    plans = [*(baseline_plans(plan) if common["baselines"] else []), plan]
    result = campaign(path, behaviours, plans, seed=common["seed"], open_model=open_model)
    echo_notes(result.notes)
    if any(a.loss is not None for a in result.artifacts):
        click.echo(attack_table(result.artifacts))
    else:
        click.echo(counts_line(result.artifacts))
    for artifact in result.artifacts:
        if attack.describe and artifact.attack == attack.name:
            click.echo(f"{artifact.behaviour_id}: {attack.describe(artifact)}")
    target = models[0] if models else "embedded"
    click.echo(f"next: {program()} transfer --run {path} --target '{target}'")
