"""Makes the command of an attack from its registry entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from attacks.registry import ATTACKS, Attack
from commands.options import (
    behaviour_options,
    chosen,
    chosen_preset,
    default_run,
    echo_notes,
    log_option,
    open_model,
    program,
    quiet_libraries,
)
from commands.output import echo_table, json_option
from commands.setting_options import flag_of, given_settings, setting_options
from commands.types import SEED_RANGE, FilePath, count
from core.rows import Row

COMMON = (
    *("run", "behaviours", "label", "splits", "limit", "preset", "seed"),
    *("save_every", "baselines", "models", "catalogue", "log_to"),
)


def attack_command(name: str) -> click.Command:
    """The command of the attack ``name``."""
    attack = ATTACKS.get(name)

    def callback(**options: Any) -> None:
        common = {key: options.pop(key) for key in COMMON if key in options}
        run_attack(attack, common, options)

    command: Any = json_option(quiet_libraries(callback))
    for option in reversed([*_options(attack), *_own_options(attack)]):
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
            type=FilePath(),
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
                help=". ".join([*parts, f"auto: {attack.on_cpu} on a CPU."]),
            )
        )
    options.append(click.option("--seed", type=SEED_RANGE, default=0))
    if attack.save_every:
        options.append(
            click.option(
                "--save-every",
                type=count(),
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
    options.append(log_option)
    if attack.catalogue:
        listed = "List the classes, their sources and what ours lack."
        options.append(click.option("--list", "catalogue", is_flag=True, help=listed))
    return options


def _preset_text(attack: Attack, preset: str) -> str:
    """The settings in which a preset differs from another."""
    changed = {key for values in attack.presets.values() for key in values}
    config = attack.config(**attack.presets[preset])
    fields = [f for f in dataclasses.fields(attack.config) if f.name in changed]
    return ", ".join(f"{flag_of(f).removeprefix('--')} {getattr(config, f.name)}" for f in fields)


def _own_options(attack: Attack) -> list[Decorator]:
    """One option per setting of the attack."""
    changed = {key for values in attack.presets.values() for key in values}
    return setting_options(attack.config, changed)


def run_attack(attack: Attack, common: Row, options: Row) -> None:
    """Attack the chosen behaviours, and print what came of it."""
    if common.get("catalogue") and attack.catalogue:
        for title, lines in attack.catalogue():
            click.echo("\n  ".join([title, *lines]))
        return
    from commands.tables.attacks import attack_rows, attack_table, counts_line
    from core.tracking import tracking
    from pipeline.campaign import Plan, baseline_plans, campaign

    preset = chosen_preset(common["preset"], attack.on_cpu) if "preset" in common else "paper"
    config = attack.make_config(
        given_settings(attack.config, options), where=attack.name, preset=preset
    )
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
    with tracking(common["log_to"], path, about[0]):
        result = campaign(path, behaviours, plans, seed=common["seed"], open_model=open_model)
    echo_notes(result.notes)
    if any(a.loss is not None for a in result.artifacts):
        echo_table(attack_table, result.artifacts, rows=attack_rows(result.artifacts))
    else:
        echo_table(counts_line, result.artifacts, rows=attack_rows(result.artifacts))
    for artifact in result.artifacts:
        if attack.describe and artifact.attack == attack.name:
            click.echo(f"{artifact.behaviour_id}: {attack.describe(artifact)}")
    target = models[0] if models else "embedded"
    click.echo(f"next: {program()} transfer --run {path} --target '{target}'")
