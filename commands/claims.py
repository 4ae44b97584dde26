"""The command claims: confirm or refute published claims on a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from commands.options import echo_notes, numbers_of, open_model, quiet_libraries
from commands.output import as_json, echo_table, json_option
from commands.study_options import study_config, study_options, study_run
from commands.types import count
from core.errors import AttackPlaneError


def _listed(context: click.Context) -> None:
    from commands.tables.study import claim_tests_table, known_claims

    echo_table(claim_tests_table, known_claims())
    context.exit()


@click.command()
@json_option
@study_options
@click.option(
    "--controls",
    type=count(2),
    default=199,
    help="Directions that mean nothing, of each kind: p is at least 1 / (1 + so many).",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be done and how long it takes here, measured on a few prompts.",
)
@click.option(
    "--list",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, param, value: _listed(ctx) if value else None,
    help="Print all claims, with what each needs.",
)
@click.option("--claims", "numbers", help="Comma-separated numbers, for example 1,2 [default: all]")
@quiet_libraries
def claims(
    run: Path | None,
    models: tuple[str, ...],
    numbers: str | None,
    controls: int,
    dry_run: bool,
    **study: Any,
) -> None:
    """Confirm or refute published claims on a model.

    Each with its measurement, interval, controls, p-values and verdict: holds, refuted or
    undecided, corrected for the number of claims (Holm). Claims about attacks take the prompts and
    replies of the run, or make the prompt-level attacks if it has none, and draw the run's plane
    anew. Writes claims.jsonl and claims.png; claims of other models and numbers stay in them.

    \b
    Examples:
      python cli.py claims --run runs/claims --model embedded+runs/demo/checkpoints/step-240
      python cli.py claims --model embedded --claims 1,2,7
    """
    from commands.tables.attacks import agreements_table, matrix_table
    from commands.tables.study import claims_table, coupling_table, plan_table
    from study.measure import claims as stage
    from study.measure import planned

    wanted = numbers_of(numbers, "numbers, for example 1,2,7")
    config = study_config(study)
    path = study_run(run, models, config)
    if dry_run:
        works = planned(path, models, wanted, config, controls=controls, open_model=open_model)
        pieces = [{"model": m} | asdict(p) for m, own in works.items() for p in own]
        echo_table(plan_table, pieces)
        return
    result = stage(path, models, wanted, config, controls=controls, open_model=open_model)
    echo_notes(result.notes)
    if result.matrix:
        echo_table(matrix_table, result.matrix)
        echo_table(agreements_table, result.agreements)
    for number, title in dict.fromkeys((c.number, c.title) for c in result.claims):
        click.echo(f"{number}. {title}")
    echo_table(claims_table, result.claims)
    if not as_json():
        title = "coupling of the carriers, effective rank of their fields"
        echo_table(coupling_table, result.claims, title=title)
    for c in result.claims:
        if c.note:
            click.echo(f"{c.number} {c.model}: {c.note}")
    for file in result.files:
        click.echo(file)
    lacking = [c for c in result.claims if wanted and not c.checks]
    if lacking:
        raise AttackPlaneError(
            "not measured: " + ", ".join(f"{c.number} on {c.model}" for c in lacking),
            where=path,
            got="; ".join(dict.fromkeys(reason for c in lacking for reason in c.held_back)),
        )


command = claims
