"""The command line: a group whose commands are the files beside this one and the attacks.

Listing the commands, and an attack's options, imports no torch.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from functools import cache
from pathlib import Path

import click

import commands
from attacks.registry import ATTACKS
from commands.attack import attack_command
from commands.options import CONTEXT, EXIT_ERROR, CleanGroup, hushable
from commands.types import FilePath
from core.errors import AttackPlaneError

OWN = (
    *("attacks", "core", "evaluation", "geometry", "interchange", "pipeline", "study", "training"),
    "transfer",
)
LIBRARIES = ("httpx", "httpcore", "urllib3", "filelock", "matplotlib")


@cache
def command_files() -> dict[str, str]:
    """Command -> module, of the files that hold a ``command``; ``import_.py`` is ``import``."""
    modules = {}
    for module in pkgutil.iter_modules(commands.__path__):
        path = Path(commands.__path__[0]) / f"{module.name}.py"
        if path.is_file() and "\ncommand = " in path.read_text(encoding="utf-8"):
            modules[module.name.rstrip("_")] = f"commands.{module.name}"
    return modules


def attack_commands() -> dict[str, str]:
    """Command -> attack: those of the package, and those of plugins that have been loaded."""
    return {name.replace("_", "-"): name for name, a in ATTACKS.all().items() if a.command}


class Root(CleanGroup):
    """Finds commands among the files and among the attacks."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*command_files(), *attack_commands()})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in command_files():
            return hushable(importlib.import_module(command_files()[name]).command)
        attack = attack_commands().get(name)
        return hushable(attack_command(attack)) if attack else None


def load_plugins(ctx: click.Context, option: click.Parameter, paths: tuple[Path, ...]) -> None:
    from core.registry import load_plugin

    for path in paths:
        try:
            load_plugin(path)
        except AttackPlaneError as error:  # options are read before errors are caught
            click.echo(f"error: {error}", err=True)
            ctx.exit(EXIT_ERROR)


@click.group(cls=Root, context_settings=CONTEXT)
@click.option(
    "--plugin",
    multiple=True,
    type=FilePath(),
    is_eager=True,
    expose_value=False,
    callback=load_plugins,
    help="Run a Python file of yours that declares attacks, judges, claims or training arms; "
    "repeatable.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.version_option(package_name="attack-plane")
def cli(debug: bool) -> None:
    """Attacks on open-weight language models, and where their prompts lie in the activations.

    \b
    Model specs:  embedded | ORG/NAME[@REVISION] | FOLDER | FILE.gguf
                  each with +ADAPTER_FOLDER and ?dtype=bfloat16 or ?load=4bit
    Exit codes:   0 done, 1 error, 2 wrong usage, 3 verification failed,
                  4 done but for cells that failed, 130 stopped (resumable)

    \b
    Example, the whole way:
      python cli.py gcg --model embedded --run runs/first
      python cli.py transfer --run runs/first --target embedded
      python cli.py directions --run runs/first --model embedded
      python cli.py plane --run runs/first --target embedded
    """
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for name in OWN:
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
