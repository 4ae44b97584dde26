"""The command demo: every stage on the embedded model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from commands.options import echo_notes, open_model, program, quiet_libraries
from commands.output import echo_table, json_option
from commands.types import FilePath

BEST_LAYERS = 2
"""Layers of each model that are printed."""


@click.command()
@click.option("--run", type=FilePath(), default=Path("runs/demo"), help="Run folder.")
@json_option
@quiet_libraries
def demo(run: Path) -> None:
    """Run every stage on the embedded model.

    Trains refusing checkpoints, attacks one, replays, estimates directions, draws the plane. Takes
    about 15 minutes on 2 cores.

    \b
    Example:
      python cli.py demo
    """
    from pipeline.demo import demo as whole

    start = time.monotonic()
    result = whole(
        run,
        open_model=open_model,
        on_stage=lambda title: click.echo(click.style(title, bold=True)),
        on_result=lambda result: show(result, run),
    )
    for path in result.files:
        click.echo(path)
    minutes = (time.monotonic() - start) / 60
    click.echo(f"{minutes:.1f} minutes; {program()} verify --run {run}")


def show(result: Any, run: Path) -> None:
    """Print what a stage gave, in the way of its own command."""
    from commands.tables.attacks import agreements_table, attack_rows, attack_table, matrix_table
    from commands.tables.plane import classes_table
    from commands.tables.study import directions_rows, directions_table
    from geometry.directions import best_layers
    from pipeline.campaign import CampaignResult
    from pipeline.directions import DirectionsResult
    from pipeline.runs import classes_of
    from pipeline.transfer import TransferResult
    from training.registry import TrainResult

    if isinstance(result, TrainResult):
        last = result.losses[-1]
        click.echo(f"{last['loss']:.3f} nats per reply token at step {last['step']:.0f}")
        return
    echo_notes(result.notes)
    if isinstance(result, CampaignResult):
        echo_table(attack_table, result.artifacts, rows=attack_rows(result.artifacts))
    elif isinstance(result, TransferResult):
        echo_table(matrix_table, result.cells)
        echo_table(agreements_table, result.agreements)
    elif isinstance(result, DirectionsResult):
        for estimated in result.directions:
            best = best_layers(estimated, BEST_LAYERS)
            echo_table(directions_table, estimated, rows=directions_rows(estimated), layers=best)
    else:
        echo_table(classes_table, classes_of(run), frames=["own"], anchors=False)


command = demo
