"""The command trajectory: what changes in a model along its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.options import echo_notes, open_model, quiet_libraries
from commands.output import echo_table, json_option
from commands.study_options import study_config, study_options, study_run


@click.command()
@study_options
@click.option("--reference", required=True, help="What drift is measured from, a model spec.")
@click.option(
    "--sweep",
    is_flag=True,
    help="Steer every checkpoint by its carriers at the papers' strengths too.",
)
@click.option(
    "--anchors",
    multiple=True,
    help="Aligned model that is reopened by its carriers, beside SG's published ones; repeatable.",
)
@json_option
@quiet_libraries
def trajectory(
    run: Path | None,
    models: tuple[str, ...],
    reference: str,
    sweep: bool,
    anchors: tuple[str, ...],
    **study: Any,
) -> None:
    """Measure what changes in a model along its training.

    Per checkpoint, with intervals and nulls: the best H and R carrier and what ablating them does
    to held-out prompts, their coupling (C_cos, C_sub, C_layer, HRCI), effective rank, drift from
    the reference, beliefs, outcome D. Arms, seeds and steps are read from the checkpoints. The
    behaviour of checkpoints that `evaluate` has measured in the same run stands beside it. Prompts
    of the run that were optimised on checkpoints and replayed on others (`gcg`, `transfer`) give
    the matrix of transfer and what predicts it. Claims about trainings are decided on all of it.
    Writes trajectory.jsonl, trajectory.parquet and a picture per family.

    \b
    Example:
      python cli.py trajectory --run runs/evaluation --reference embedded \\
          --model embedded+runs/sft/step-50 --model embedded+runs/sft/step-100
    """
    from commands.tables.study import claims_table
    from commands.tables.trajectory import anchors_table, predictions_table, trajectory_table
    from study.trajectory import trajectory as stage

    config = study_config(study)
    path = study_run(run, (reference, *models), config)
    result = stage(
        path, reference, models, config, sweeps=sweep, anchors=anchors, open_model=open_model
    )
    if result.anchors:
        echo_table(anchors_table, result.anchors, title="aligned anchors, ASR by what is ablated")
    echo_notes(result.notes)
    echo_table(trajectory_table, result.rows)
    if result.predictions:
        echo_table(predictions_table, result.predictions, title="\nwhat predicts transfer")
    if result.claims:
        click.echo()
    for number, title in dict.fromkeys((c.number, c.title) for c in result.claims):
        click.echo(f"{number}. {title}")
    if result.claims:
        echo_table(claims_table, result.claims)
    for file in result.files:
        click.echo(str(file))


command = trajectory
