"""The command train: one command per training arm, made from its registry entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from commands.options import CleanGroup, file_options, hushable, log_option, quiet_libraries
from commands.output import echo_table, json_option
from commands.setting_options import flag_of, given_settings, setting_options
from commands.types import FilePath
from core.rows import Row

Decorator = Callable[..., Any]


COMMON = ("model", "out", "behaviours", "replies", "preset", "log_to")
ADAPTERS = (
    "Checkpoints are LoRA folders OUT/step-N, targets by the spec MODEL+OUT/step-N. The same "
    "command goes on after a stop. With several devices: accelerate launch cli.py train ..."
)
HOOK = (
    "What comes out is a hook and no weights: a folder in OUT, a target by the spec MODEL+FOLDER. "
    "It is fitted in one process."
)


class Arms(CleanGroup):
    """Its commands are the training arms of the registry."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from training.registry import ARMS

        return sorted(ARMS.all())

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        from training.registry import ARMS

        return hushable(arm_command(name)) if name in ARMS.all() else None


@click.group(cls=Arms)
def train() -> None:
    """Train checkpoints, which are targets like any other."""


def arm_command(name: str) -> click.Command:
    """The command of one arm."""
    from training.registry import ARMS

    arm = ARMS.get(name)

    def callback(**options: Any) -> None:
        common = {k: options.pop(k) for k in COMMON}
        run_arm(name, common, given_settings(arm.config, options))

    changed = {key for values in arm.presets.values() for key in values}
    command: Any = file_options(json_option(quiet_libraries(callback)))
    for option in reversed([*_options(), *setting_options(arm.config, changed)]):
        command = option(command)
    examples = "".join(f"  python cli.py {example}\n" for example in arm.examples)
    made = HOOK if arm.fit else ADAPTERS
    text = (
        f"{arm.summary}\n\nSource: {arm.source}. {made}\n\n\b\n"
        f"Examples:\n{examples}\n\b\nThe preset small (paper -> small):\n{_difference(arm)}"
    )
    return click.command(name, help=text)(command)


def _options() -> list[Decorator]:
    return [
        click.option("--model", default="embedded", help="Base model (a model spec)."),
        click.option(
            "--out",
            required=True,
            type=FilePath(),
            help="Folder of the checkpoints, for example runs/sft.",
        ),
        click.option(
            "--behaviours",
            default="demonstration",
            help="Requests: the demonstration set, a file or a hub set; the split train is used "
            "where there is one.",
        ),
        click.option(
            "--replies",
            help="CSV or JSON lines file of request and reply, or ultrachat (hub), in place of the "
            "set's ordinary requests and the base's own replies.",
        ),
        click.option(
            "--preset",
            type=click.Choice(["auto", "paper", "small"]),
            default="auto",
            help="paper: published values. small: fits two cores, see above. auto: small on a CPU.",
        ),
        log_option,
    ]


def _difference(arm: Any) -> str:
    """One line per setting in which the preset ``small`` differs from the paper's."""
    from training.config import differences

    paper, small = (arm.make_config({}, preset=name) for name in arm.presets)
    flags = {f.name: flag_of(f) for f in dataclasses.fields(arm.config)}
    changed = differences(small, paper)
    return "".join(f"  {flags[k]}  {_text(a)} -> {_text(b)}\n" for k, (a, b) in changed.items())


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def run_arm(name: str, common: Row, settings: Row) -> None:
    """Train, and print what came of it."""
    from commands.options import chosen_preset, echo_notes, program
    from commands.tables.training import training_table
    from core.tracking import tracking
    from pipeline.train import train_arm
    from training.registry import ARMS

    preset = chosen_preset(common["preset"], on_cpu="small")
    config = ARMS.get(name).make_config(settings, preset=preset)
    model, out = common["model"], common["out"]
    updates = f"{config.num_steps} updates" if hasattr(config, "num_steps") else "a fit"
    click.echo(f"train {name}: {updates} on {model} -> {out}")
    replies = common["replies"]
    with tracking(common["log_to"], out, dataclasses.asdict(config)):
        trained = train_arm(name, model, out, config, common["behaviours"], replies=replies)
    if not trained.first:
        return
    steps = getattr(config, "saved_steps", ())
    echo_table(training_table, trained, rows=trained.losses, steps=steps)
    echo_notes([trained.note] if trained.note else [])
    for file in trained.files:
        click.echo(str(file))
    for path in trained.checkpoints:
        click.echo(f"{model}+{path}")
    last = f"{model}+{trained.checkpoints[-1]}"
    click.echo(f"next: {program()} evaluate --run runs/evaluation --model {model} --model '{last}'")


command = train
