"""The command verify: render and score every artifact anew."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from commands.options import EXIT_VERIFY, RUN, open_model, quiet_libraries
from commands.output import echo_rows, json_option
from commands.types import Finite


@click.command()
@RUN
@click.option(
    "--tolerance",
    type=Finite(0),
    default=1e-3,
    help="Largest difference of losses (nats per target token).",
)
@json_option
@quiet_libraries
def verify(run: Path, tolerance: float) -> None:
    """Render and score every artifact anew.

    Exits with 3 where loss or token fidelity does not hold.

    \b
    Example:
      python cli.py verify --run runs/first
    """
    from pipeline.verify import verify as stage

    faults = count = unclaimed = 0
    for artifact, verified in stage(run, tolerance, open_model=open_model):
        if verified is None:
            unclaimed += 1
            continue
        count += 1
        faults += verified.fault is not None
        state = f"FAULT: {verified.fault}" if verified.fault else "holds"
        name = f"{artifact.artifact_id}  {artifact.attack:15} {artifact.behaviour_id:28}"
        click.echo(f"{name} {state}")
        about = ("artifact_id", "attack", "behaviour_id", "source_model")
        echo_rows("verify", [{k: getattr(artifact, k) for k in about} | {"fault": verified.fault}])
    click.echo(f"{count - faults} of {count} artifacts hold")
    if unclaimed:
        why = "claim no loss or tokens that could be checked (prompt-level or imported)"
        click.echo(f"{unclaimed} more {why}")
    if faults:
        sys.exit(EXIT_VERIFY)


command = verify
