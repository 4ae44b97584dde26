"""The command directions: harmfulness and refusal at every layer, with intervals and nulls."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import (
    JUDGE,
    RUN,
    SEED,
    SYSTEM,
    TEMPLATE,
    echo_notes,
    file_options,
    open_model,
    quiet_libraries,
)
from commands.output import echo_table, json_option
from commands.types import count


@click.command()
@RUN
@click.option("--model", "models", multiple=True, required=True, help="Model spec; repeatable.")
@click.option("--estimator", type=click.Choice(["harc", "zhao", "both"]), default="both")
@click.option(
    "--contrast", default="demonstration", help="Behaviours with labels harmful and harmless."
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    help="Only these splits [default: train and validation of the demonstration set, else all]",
)
@click.option(
    "--resamples",
    type=count(20),
    default=200,
    help="Bootstrap samples and null draws.",
)
@JUDGE
@SYSTEM
@TEMPLATE
@SEED
@file_options
@json_option
@quiet_libraries
def directions(
    run: Path,
    models: tuple[str, ...],
    estimator: str,
    contrast: str,
    splits: tuple[str, ...],
    resamples: int,
    judge: str,
    system: str | None,
    template: str,
    seed: int,
) -> None:
    """Estimate directions at every layer.

    Harmfulness and refusal, by difference of means, with intervals and nulls.

    \b
    Example:
      python cli.py directions --run runs/first --model embedded --estimator harc
    """
    from commands.tables.study import directions_rows, directions_table
    from evaluation.behaviours import CONTRAST_SPLITS
    from geometry.directions import ESTIMATORS
    from pipeline.contrast_reading import DirectionsConfig, splits_of
    from pipeline.directions import directions as stage

    config = DirectionsConfig(
        contrast=contrast,
        splits=splits_of(contrast, splits, CONTRAST_SPLITS),
        resamples=resamples,
        seed=seed,
        system_prompt=system,
        judge=judge,
        template=template,
    )
    estimators = ESTIMATORS if estimator == "both" else (estimator,)
    result = stage(run, models, estimators, config, open_model=open_model)
    echo_notes(result.notes)
    for estimated in result.directions:
        echo_table(directions_table, estimated, rows=directions_rows(estimated))


command = directions
