"""The command transfer: replay frozen prompts on targets and judge."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import RUN, echo_notes, open_model, quiet_libraries
from evaluation.judges.registry import DEFAULT_JUDGES


@click.command()
@RUN
@click.option(
    "--target",
    "targets",
    multiple=True,
    required=True,
    help="Target model (a model spec); repeatable.",
)
@click.option(
    "--judge",
    "judges",
    multiple=True,
    default=DEFAULT_JUDGES,
    help="refusal_phrases, target_prefix, classifier:MODEL[#LABEL], judgezoo:NAME, or a plugin's; "
    "the first one decides.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=64)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0: greedy.")
@click.option("--seed", type=int, default=0, help="Random seed of the sampling.")
@click.option("--batch-size", type=click.IntRange(1), default=16)
@quiet_libraries
def transfer(
    run: Path,
    targets: tuple[str, ...],
    judges: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> None:
    """Replay frozen prompts on targets and judge.

    Every artifact of the run is sent verbatim; replies and judgements are kept.

    \b
    Example:
      python cli.py transfer --run runs/first --target embedded \\
          --target embedded+runs/demo/checkpoints/step-12
    """
    from commands.tables.attacks import matrix_table
    from pipeline.transfer import transfer as stage
    from transfer.replay import ReplayConfig

    config = ReplayConfig(max_new_tokens, temperature, seed)
    result = stage(run, targets, judges, config, batch_size=batch_size, open_model=open_model)
    echo_notes(result.notes)
    click.echo(matrix_table(result.cells))


command = transfer
