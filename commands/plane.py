"""The command plane: project, export and draw."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import RUN, echo_notes, file_options, open_model, quiet_libraries
from commands.output import echo_table, json_option
from commands.types import count


@click.command()
@RUN
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Target model; repeatable [default: all of the run]",
)
@click.option("--base", help="Model of the base frame [default: the first target]")
@click.option("--estimator", type=click.Choice(["harc", "zhao"]), default="harc")
@click.option(
    "--layer",
    type=count(0),
    help="Layer [default: the base model's best layer score]",
)
@click.option(
    "--position",
    type=click.Choice(["t_inst", "t_goal"]),
    default="t_inst",
    help="Where harmfulness is read: at the last token of the content, or of the request in it.",
)
@click.option("--anchors", default="demonstration", help="Plain prompts drawn as anchors.")
@click.option(
    "--anchor-split",
    "anchor_splits",
    multiple=True,
    help="Only these splits [default: test of the demonstration set, else all]",
)
@file_options
@json_option
@quiet_libraries
def plane(
    run: Path,
    targets: tuple[str, ...],
    base: str | None,
    estimator: str,
    layer: int | None,
    anchors: str,
    anchor_splits: tuple[str, ...],
    position: str,
) -> None:
    """Project, export and draw the plane.

    Writes CSV, JSONL, Parquet, PNG and HTML into the run folder, in place of an earlier plane.

    \b
    Example:
      python cli.py plane --run runs/first
    """
    from commands.tables.plane import classes_table, success_table
    from core.files import read_rows
    from evaluation.behaviours import HELD_OUT_SPLITS
    from pipeline.contrast_reading import splits_of
    from pipeline.plane import PlaneConfig
    from pipeline.plane import plane as stage
    from pipeline.plane_files import SUCCESS
    from pipeline.runs import classes_of

    splits = splits_of(anchors, anchor_splits, HELD_OUT_SPLITS)
    config = PlaneConfig(base, estimator, layer, anchors, splits, position)
    result = stage(run, targets, config, open_model=open_model)
    echo_notes(result.notes)
    echo_table(classes_table, classes_of(run))
    title = "success within attack classes"
    echo_table(success_table, read_rows(run / SUCCESS), title=title)
    for path in result.files:
        click.echo(path)


command = plane
