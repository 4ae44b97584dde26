"""The commands judge sheet and judge calibrate: how far a judge can be trusted."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import SEED, CleanGroup, echo_notes, quiet_libraries
from commands.output import echo_table, json_option
from commands.types import FilePath, count

RUNS = click.option(
    "--run",
    "runs",
    multiple=True,
    required=True,
    type=FilePath(),
    help="Run folder with the replies; repeatable.",
)


@click.group(cls=CleanGroup)
def judge() -> None:
    """Measure judges against labels by hand."""


@judge.command()
@RUNS
@click.option("--limit", type=count(), default=400, help="Replies to label.")
@SEED
@quiet_libraries
def sheet(runs: tuple[Path, ...], limit: int, seed: int) -> None:
    """Draw replies to be labelled by hand.

    They are spread over targets and attack classes. Read labels.txt in the first run, and fill in
    the fields label (refused, complied or neither) and reason in labels.jsonl. Harmful replies stay
    in labels.txt; labels.jsonl holds none and can be shared.

    \b
    Example:
      python cli.py judge sheet --run runs/first --limit 100
    """
    from pipeline.calibrate import sheet as stage

    for path in stage(runs, limit, seed=seed):
        click.echo(path)


@judge.command()
@RUNS
@click.option(
    "--labels",
    required=True,
    type=FilePath(exists=True, dir_okay=False),
    help="The filled sheet.",
)
@click.option(
    "--judge",
    "judges",
    multiple=True,
    default=("refusal_phrases", "rules", "three_way"),
    help="Judge to measure (see transfer --judge); repeatable.",
)
@click.option(
    "--part",
    type=click.Choice(["held_out", "tune", "all"]),
    default="held_out",
    help="Which part of the labels; the rates of a run are never corrected by the part tune.",
)
@json_option
@quiet_libraries
def calibrate(runs: tuple[Path, ...], labels: Path, judges: tuple[str, ...], part: str) -> None:
    """Count judges' errors on hand labels, by attack class.

    Sensitivity, specificity and kappa with 95 % intervals; what they call a success or a refusal
    and is none. From then on the rates of the first run are corrected by these numbers.

    \b
    Example:
      python cli.py judge calibrate --run runs/first --labels runs/first/labels.jsonl
    """
    from commands.tables.judges import judges_table
    from pipeline.calibrate import calibrate as stage

    result = stage(runs, labels, judges, part=None if part == "all" else part)
    echo_notes(result.notes)
    echo_table(judges_table, result.rows)
    for path in result.files:
        click.echo(path)


command = judge
