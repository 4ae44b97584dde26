"""The command merge: join run folders, such as the shards of a sweep."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import RUN, echo_notes, quiet_libraries
from commands.output import echo_table, json_option
from commands.types import FilePath


@click.command()
@RUN
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=FilePath())
@json_option
@quiet_libraries
def merge(run: Path, folders: tuple[Path, ...]) -> None:
    """Join run folders, such as the shards of a sweep.

    Prompts and replies are joined by their ids. Two different rows of one id, or other settings of
    a stage, are refused; nothing is written then. Directions and planes are made anew by the sweep
    without --shard, or by their commands.

    \b
    Example:
      python cli.py sweep examples/sweep.toml --shard 1/2
      python cli.py sweep examples/sweep.toml --shard 2/2
      python cli.py merge --run runs/classes runs/classes-shard-*
      python cli.py sweep examples/sweep.toml
    """
    from commands.tables.layout import plain_table
    from pipeline.merge import merge as join

    result = join(run, folders)
    echo_notes(result.notes)
    rows = [{"file": name, "rows added": count} for name, count in result.added.items()]
    echo_table(plain_table, rows, name="merge")


command = merge
