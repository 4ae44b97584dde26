"""What the commands share: clean errors and exit codes, options that several take."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.types import SEED_RANGE, FilePath, count
from core.errors import AttackPlaneError
from core.tracking import KINDS
from evaluation.judges.registry import QUICK_JUDGE

if TYPE_CHECKING:
    from core.models import LoadedModel, ModelHandle
    from core.records import Behaviour

EXIT_ERROR, EXIT_VERIFY, EXIT_PARTLY, EXIT_INTERRUPTED = 1, 3, 4, 130
ISSUES = "CONTRIBUTING.md says where"
CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": shutil.get_terminal_size().columns,
    "show_default": True,
}
SHELF = "core.shelf"
"""Where a command's context has its models."""
DEFAULT_LIMIT = 4
"""Behaviours of the demonstration set that an attack without options takes."""


class CleanGroup(click.Group):
    """Turns the suite's errors into clean messages and exit codes; Ctrl-C says how to go on."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(hushable(cmd), name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AttackPlaneError as error:
            if ctx.find_root().params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(EXIT_ERROR)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click tells these by itself; a reader that has seen enough is no error
        except OSError as error:  # the disk is full, a name too long, a file not ours to write
            if ctx.find_root().params.get("debug"):
                raise
            told = AttackPlaneError(
                "the system cannot read or write something",
                where=error.filename,
                got=error.strerror or error,
            )
            click.echo(f"error: {told}", err=True)
            ctx.exit(EXIT_ERROR)
        except Exception as error:  # a fault of ours: one line here, all of it under --debug
            if ctx.find_root().params.get("debug"):
                raise
            if _lacks_memory(error):
                told = AttackPlaneError(
                    "the memory does not suffice",
                    got=" ".join(str(error).split())[:200] or type(error).__name__,
                    remedy="a smaller width, batch or model; the same command goes on from here",
                )
                click.echo(f"error: {told}", err=True)
                ctx.exit(EXIT_ERROR)
            click.echo(f"unexpected error: {type(error).__name__}: {error}", err=True)
            click.echo(
                "this is a fault of the suite: please report it with the traceback that --debug "
                f"before the command shows ({ISSUES})",
                err=True,
            )
            ctx.exit(EXIT_ERROR)
        except KeyboardInterrupt:
            click.echo("\nstopped; the same command goes on from here", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def _lacks_memory(error: Exception) -> bool:
    """Whether Python, or torch on any device, could not get the memory it asked for."""
    words = ("can't allocate memory", "not enough memory")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(word in str(error) for word in words)


def _hush(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    """Draw no bars, and log nothing below an error, for this command."""
    from core.progress import reporting

    if value:
        ctx.with_resource(reporting(None))
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        ctx.call_on_close(lambda: logging.disable(before))


def hushable(command: click.Command) -> click.Command:
    """The command with the option ``--quiet``, which every command has."""
    if not isinstance(command, click.Group) and all(p.name != "quiet" for p in command.params):
        command.params.append(
            click.Option(
                ["--quiet"],
                is_flag=True,
                expose_value=False,
                callback=_hush,
                help="Results only: no bars, no warnings.",
            )
        )
    return command


def quiet_libraries(command: Callable[..., None]) -> Callable[..., None]:
    """Turn off the libraries' warnings for a command."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        import warnings

        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        if "transformers" in sys.modules:
            sys.modules["transformers"].utils.logging.set_verbosity_error()
        else:  # it reads this when it is imported, which a quick command never does
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        command(*args, **kwargs)

    return wrapped


def open_model(spec: str) -> ModelHandle:
    """A model that says what it is when it is loaded, once in a command if memory allows."""
    from core.shelf import Shelf

    def describe(loaded: LoadedModel) -> None:
        click.echo(loaded.describe())

    meta = click.get_current_context().meta
    if SHELF not in meta:
        meta[SHELF] = Shelf(describe)
    shelf: Shelf = meta[SHELF]
    return shelf(spec)


def program() -> str:
    """How the command line was called, for the next command that is proposed."""
    name = click.get_current_context().find_root().info_name or ""
    return "python cli.py" if name.endswith(".py") else "attack-plane"


def echo_notes(notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(note)


# --- options --------------------------------------------------------------------------------------
RUN = click.option(
    "--run",
    required=True,
    type=FilePath(),
    help="Run folder, for example runs/first.",
)
log_option = click.option(
    "--log-to",
    type=click.Choice(KINDS),
    help="Send losses to a tracker that is installed; keys and addresses are its own affair.",
)
SEED = click.option("--seed", type=SEED_RANGE, default=0, help="Random seed.")
SYSTEM = click.option("--system", help="System prompt.")
JUDGE = click.option(
    "--judge", default=QUICK_JUDGE, help="Says refused or complied (see transfer --judge)."
)

TEMPLATE = click.option(
    "--template",
    type=click.Choice(["chat", "raw"]),
    default="chat",
    help="raw: without the system text that the model's chat template adds by itself (HARC's "
    "second script).",
)


def _read_files_so(ctx: click.Context, option: click.Parameter, value: Any) -> None:
    """Keep how files of behaviours are read, for this command alone."""
    from evaluation.behaviours import reading_files

    if value:
        ctx.with_resource(reading_files(**{str(option.name): value}))


def file_options(command: Callable[..., None]) -> Callable[..., None]:
    """How files of behaviours are read: ``--label-of-file --merge-duplicates``."""
    shared: dict[str, Any] = {"expose_value": False, "callback": _read_files_so}
    for option in (
        click.option(
            "--merge-duplicates",
            is_flag=True,
            help="Of two rows with one request in a file take the first, and print the lines.",
            **shared,
        ),
        click.option(
            "--label-of-file",
            type=click.Choice(["harmful", "harmless", "pseudo_harmful"]),
            help="Label of the rows of a file that says none.",
            **shared,
        ),
    ):
        command = option(command)
    return command


def behaviour_options(command: Callable[..., None]) -> Callable[..., None]:
    """Which behaviours: ``--behaviours --label --split --limit``; ``chosen`` reads them."""
    command = file_options(command)
    for option in (
        click.option(
            "--limit",
            type=count(),
            help="So many, spread over categories [default: 4 of a built-in set, else all]",
        ),
        click.option(
            "--split",
            "splits",
            multiple=True,
            help="Only these splits [default: test of the demonstration set, else all]",
        ),
        click.option(
            "--label",
            default="harmful",
            help="Only behaviours with this label; 'any' for all.",
        ),
        click.option(
            "--behaviours",
            default="demonstration",
            help="demonstration, demonstration-v1, a CSV/JSON/JSONL/TXT file, or a hub set.",
        ),
    ):
        command = option(command)
    return command


def chosen(
    behaviours: str, label: str, splits: tuple[str, ...], limit: int | None
) -> tuple[list[Behaviour], int]:
    """The behaviours that the options name, and of how many."""
    from evaluation.behaviours import BUILT_IN, spread, to_attack

    known = to_attack(behaviours, label, splits or None)
    most = limit or (DEFAULT_LIMIT if behaviours in BUILT_IN else None)
    return spread(known, most), len(known)


def chosen_preset(preset: str, on_cpu: str) -> str:
    """``auto`` is ``on_cpu`` on a CPU and ``paper`` elsewhere, and says so."""
    from core.weights import default_device

    if preset == "auto":
        device = default_device().type
        preset = on_cpu if device == "cpu" else "paper"
        click.echo(f"preset {preset} for {device} (--preset chooses another)")
    return preset


def default_run(name: str, model: str, settings: Any) -> Path:
    """A run folder for an attack or a study with these settings."""
    from core.records import content_hash
    from core.specs import canonical_name

    return Path("runs") / f"{name}-{canonical_name(model)}-{content_hash(settings, 8)}"


def numbers_of(text: str | None, example: str) -> list[int]:
    """``"1,2,7"`` -> [1, 2, 7]."""
    try:
        return [int(n) for n in text.split(",")] if text else []
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: expected {example}") from error
