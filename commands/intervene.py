"""The command intervene: ablate or steer directions, against controls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from commands.options import echo_notes, numbers_of, open_model, quiet_libraries
from commands.output import echo_table, json_option
from commands.study_options import study_config, study_options, study_run
from commands.types import Finite, count
from core.settings import MOST


@click.command()
@study_options
@click.option(
    "--mode",
    "modes",
    multiple=True,
    type=click.Choice(["H", "R", "H+R", "H-R", "R-H"]),
    default=("H", "R", "R-H"),
    help="Directions; H-R is H without its component along R. Repeatable.",
)
@click.option("--operation", type=click.Choice(["ablate", "steer"]), default="ablate")
@click.option(
    "--strength",
    "strengths",
    multiple=True,
    type=Finite(-MOST, MOST),
    help="Lambda; steering in units of the refusal carrier's class difference. Repeatable "
    "[default: 1]",
)
@click.option(
    "--sweep", is_flag=True, help="The papers' strengths: -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4."
)
@click.option(
    "--layers",
    "at",
    help="Comma-separated residual layers, or all [default: all to ablate, the refusal carrier's "
    "to steer]",
)
@click.option(
    "--where",
    default="all",
    help="Tokens: all, prompt, reply, a position (t_inst, -1) or a range (t_inst..-1).",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    default=("harmful", "harmless", "pseudo_harmful"),
    help="Only held-out prompts with this label; repeatable.",
)
@click.option("--limit", type=count(), help="So many prompts of each label, in place of --prompts.")
@click.option("--max-new-tokens", type=count(), default=20)
@click.option(
    "--controls",
    type=count(2),
    default=5,
    help="Random directions of each kind of control.",
)
@json_option
@quiet_libraries
def intervene(
    run: Path | None,
    models: tuple[str, ...],
    modes: tuple[str, ...],
    operation: str,
    strengths: tuple[float, ...],
    sweep: bool,
    at: str | None,
    where: str,
    labels: tuple[str, ...],
    limit: int | None,
    max_new_tokens: int,
    controls: int,
    **study: Any,
) -> None:
    """Ablate or steer directions, against controls.

    Vectors are the best carriers of harmfulness and refusal, found on the contrast prompts;
    effects are measured on held-out ones: success, refusals, other replies, outcome D, the
    log-odds and log-probability of a refusal, KL of the next token. Controls: random directions,
    the carrier of a wrong layer and of a wrong position, and random directions that move every
    token exactly as far. Writes interventions.jsonl, interventions_summary.jsonl and
    interventions.png, in place of earlier ones.

    \b
    Examples:
      python cli.py intervene --run runs/claims --model embedded+runs/demo/checkpoints/step-240
      python cli.py intervene --run runs/claims --model embedded --mode R --operation steer \\
          --sweep --label harmless
    """
    from commands.tables.attacks import agreements_table
    from commands.tables.study import effects_table
    from study.intervene import SWEEP, Plan
    from study.intervene import intervene as stage

    if sweep and strengths:
        raise click.UsageError("--sweep and --strength exclude each other")
    layers: tuple[int, ...] | None
    if at is None or at == "all":
        layers = None if at is None else ()
    else:
        layers = tuple(numbers_of(at, "layers, for example 12,13, or all"))
    plan = Plan(
        modes=modes,
        operation=operation,
        strengths=SWEEP if sweep else strengths or (1.0,),
        layers=layers,
        where=where,
        labels=labels,
        limit=limit,
        max_new_tokens=max_new_tokens,
        controls=controls,
    )
    config = study_config(study)
    path = study_run(run, models, config)
    if limit:
        config = replace(config, held_out_prompts=limit)
    result = stage(path, models, config, plan, open_model=open_model)
    echo_notes(result.notes)
    echo_table(effects_table, result.effects)
    echo_table(agreements_table, result.agreements)
    for file in result.files:
        click.echo(file)


command = intervene
