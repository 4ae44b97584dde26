"""The command transfer: replay frozen prompts on targets and judge."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import RUN, echo_notes, file_options, open_model, quiet_libraries
from commands.output import echo_table, json_option
from commands.types import SEED_RANGE, Finite, count
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
    help="three_way[:MODEL], rules, refusal_phrases, target_prefix, classifier:MODEL[#LABEL], "
    "judgezoo:NAME, or a plugin's; the first one decides.",
)
@click.option("--behaviours", help="Also send these requests as they are, without an attack.")
@click.option(
    "--label",
    type=click.Choice(["harmful", "harmless", "pseudo_harmful", "any"]),
    default="any",
    help="Of those, only this label.",
)
@click.option("--split", "splits", multiple=True, help="Of those, only these splits; repeatable.")
@click.option("--system", help="System prompt of those requests.")
@click.option(
    "--max-new-tokens",
    type=count(),
    help="New tokens of a reply [default: 64, more for classes that ask for copying]",
)
@click.option("--temperature", type=Finite(0), default=0.0, help="0: greedy.")
@click.option("--seed", type=SEED_RANGE, default=0, help="Random seed of the sampling.")
@click.option(
    "--replies", type=count(), default=1, help="Replies to each prompt; needs a temperature."
)
@click.option("--batch-size", type=count(), default=16)
@file_options
@json_option
@quiet_libraries
def transfer(
    run: Path,
    targets: tuple[str, ...],
    judges: tuple[str, ...],
    behaviours: str | None,
    label: str,
    splits: tuple[str, ...],
    system: str | None,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    replies: int,
    batch_size: int,
) -> None:
    """Replay frozen prompts on targets and judge.

    Every artifact of the run is sent verbatim, and the plain request of every attacked one; replies
    and judgements are kept.

    \b
    Examples:
      python cli.py transfer --run runs/first --target embedded \\
          --target embedded+runs/demo/checkpoints/step-90
      python cli.py transfer --run runs/plain --target embedded --behaviours demonstration
    """
    from commands.tables.attacks import agreements_table, matrix_table
    from evaluation.behaviours import to_attack
    from pipeline.transfer import transfer as stage
    from transfer.replay import ReplayConfig

    if not behaviours and (label != "any" or splits or system):
        raise click.UsageError("--label, --split and --system need --behaviours")
    config = ReplayConfig(max_new_tokens, temperature, seed, replies)
    result = stage(
        run,
        targets,
        judges,
        config,
        behaviours=to_attack(behaviours, label, splits or None) if behaviours else (),
        system_prompt=system,
        batch_size=batch_size,
        open_model=open_model,
    )
    echo_notes(result.notes)
    echo_table(matrix_table, result.cells)
    echo_table(agreements_table, result.agreements)


command = transfer
