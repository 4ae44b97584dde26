"""The command demo: every stage on the embedded model."""

from __future__ import annotations

import time
from pathlib import Path

import click

from commands.options import echo_notes, open_model, quiet_libraries

BEST_LAYERS = 2
"""Layers of each model that are printed."""


@click.command()
@click.option(
    "--run", type=click.Path(path_type=Path), default=Path("runs/demo"), help="Run folder."
)
@quiet_libraries
def demo(run: Path) -> None:
    """Run every stage on the embedded model.

    Trains refusing checkpoints, attacks one, replays, estimates directions, draws the plane. Takes
    less than 15 minutes on 2 cores.

    \b
    Example:
      python cli.py demo
    """
    from commands.tables.attacks import attack_table, matrix_table
    from commands.tables.plane import classes_table
    from commands.tables.study import directions_table
    from core.store import read_rows
    from geometry.directions import best_layers
    from pipeline.demo import demo as whole
    from pipeline.plane_files import CLASSES

    start = time.monotonic()
    result = whole(
        run,
        open_model=open_model,
        on_stage=lambda title: click.echo(click.style(title, bold=True)),
    )
    echo_notes(result.notes)
    last = result.training.losses[-1]
    click.echo(f"training: {last['loss']:.3f} nats per reply token at step {last['step']:.0f}")
    click.echo(attack_table(result.attacks.artifacts))
    for estimated in result.directions:
        click.echo(directions_table(estimated, best_layers(estimated, BEST_LAYERS)))
    rows = read_rows(run / CLASSES)
    click.echo(classes_table(rows, frames=["own"], anchors=False))
    click.echo(matrix_table(result.matrix))
    for path in result.files:
        click.echo(path)
    minutes = (time.monotonic() - start) / 60
    click.echo(f"{minutes:.1f} minutes; python cli.py verify --run {run}")


command = demo
