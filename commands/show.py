"""The command show: print what a run holds."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path

import click

from commands.options import RUN
from commands.output import echo_table, json_option

LISTED = 300
"""Prompts that are listed one by one; of more the sums are told."""


@click.command()
@RUN
@json_option
def show(run: Path) -> None:
    """Print what a run holds.

    Settings, losses, success rates, classes on the plane. Of more than 300 prompts, the sums of
    each attack.

    \b
    Example:
      python cli.py show --run runs/demo
    """
    from commands.tables.attacks import (
        attack_rows,
        attack_table,
        matrix_table,
        prompt_sums,
        prompts_table,
    )
    from commands.tables.plane import classes_table
    from core.store import RunFolder
    from pipeline.matrices import matrix_of, require_whole
    from pipeline.runs import classes_of, each_artifact

    folder = RunFolder.existing(run)
    for stage, settings in folder.manifest["stages"].items():
        short = {k: v for k, v in settings.items() if not isinstance(v, list) or len(v) < 9}
        told = ", ".join(f"{key}={value}" for key, value in short.items())
        click.echo(f"{stage}: {told}" if told else stage)
    require_whole(folder)
    artifacts = each_artifact(folder)
    few = list(islice(artifacts, LISTED))
    more = next(artifacts, None)
    if more is None:
        for source in dict.fromkeys(a.source_model for a in few):
            click.echo(f"\nsource {source}")
            own = [a for a in few if a.source_model == source]
            echo_table(attack_table, own, rows=attack_rows(own))
    else:
        click.echo()
        echo_table(prompts_table, prompt_sums(chain(few, [more], artifacts)))
    cells = matrix_of(folder)
    if any(cell.replays for cell in cells):
        click.echo()
        echo_table(matrix_table, cells)
    if rows := classes_of(run):
        click.echo()
        echo_table(classes_table, rows)


command = show
