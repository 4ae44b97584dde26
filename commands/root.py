"""The command line: a group whose commands are the files beside this one and the attacks.

Listing the commands imports no torch: an attack's command is built when it is asked for.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click

import commands
from commands.attack_index import declared_commands
from commands.options import CONTEXT, EXIT_ERROR, CleanGroup, hushable
from commands.types import FilePath
from core.errors import AttackPlaneError

OWN = (
    *("attacks", "core", "evaluation", "geometry", "interchange", "pipeline", "study", "training"),
    "transfer",
)
LIBRARIES = ("httpx", "httpcore", "urllib3", "filelock", "matplotlib")


class AttackStub(click.Command):
    """Stands for an attack's command, which is built when it is called or its help is shown."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        return self._real().make_context(info_name, args, parent=parent, **extra)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return self._real().get_params(ctx)

    def _real(self) -> click.Command:
        from commands.attack import attack_command

        assert self.name is not None
        return hushable(attack_command(self.name.replace("-", "_")))


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
    """Attack -> summary: those of the package, and those of plugins that have been loaded."""
    summaries = dict(declared_commands())
    if registry := sys.modules.get("attacks.registry"):
        summaries |= {a.name: a.summary for a in registry.ATTACKS.declared() if a.command}
    return {name.replace("_", "-"): summary for name, summary in summaries.items()}


class Root(CleanGroup):
    """Finds commands among the files and among the attacks."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*command_files(), *attack_commands()})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in command_files():
            return hushable(importlib.import_module(command_files()[name]).command)
        summary = attack_commands().get(name)
        return AttackStub(name, help=summary) if summary else None


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
