"""The command sweep: a whole grid from a TOML file, with its plan and an estimate of time first."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from commands.options import EXIT_PARTLY, echo_notes, open_model, quiet_libraries
from commands.output import as_json, echo_table, json_option
from commands.types import FilePath, count

if TYPE_CHECKING:
    from pipeline.sweep.config import SweepConfig
    from pipeline.sweep.plan import Part
    from pipeline.sweep.run import SweepResult

ENGINES = ("plain", "ray")


@click.command()
@click.argument("config", type=FilePath())
@click.option("--dry-run", is_flag=True, help="Print the plan and the estimated time only.")
@click.option("--shard", help="Only the i-th of n parts, such as 2/7; merge joins them.")
@click.option("--engine", type=click.Choice(ENGINES), default=ENGINES[0], help="ray: on a cluster.")
@click.option("--workers", type=count(), help="Of ray [default: one per GPU, else per core].")
@json_option
@quiet_libraries
def sweep(config: Path, dry_run: bool, shard: str | None, engine: str, workers: int | None) -> None:
    """Run a whole grid from a TOML file.

    Behaviours x attacks x sources, imports, then transfer, directions and plane, in one run folder.
    The plan is printed first; the same command goes on after a stop and tries failed cells again.
    Exit code 4 says that cells failed.

    \b
    Examples:
      python cli.py sweep examples/sweep.toml --dry-run
      python cli.py sweep examples/sweep.toml
      python cli.py sweep examples/sweep.toml --shard 2/7
      python cli.py sweep examples/sweep.toml --engine ray --workers 4
    """
    from pipeline.sweep.config import behaviours_of, read_config
    from pipeline.sweep.plan import plan, speed_of
    from pipeline.sweep.run import sweep as whole
    from pipeline.sweep.shards import parse_shard
    from pipeline.toml_file import faults_of

    if workers and engine == "plain":
        raise click.UsageError("--workers needs --engine ray")
    if shard is not None and engine != "plain":
        raise click.UsageError("give either --shard or --engine ray: a cluster shares out the work")
    grid, part = read_config(config), parse_shard(shard) if shard is not None else None
    if part:
        grid = replace(grid, run=part.folder(grid.run))
    with faults_of(config):
        behaviours = len(behaviours_of(grid))
    speed = speed_of(open_model(grid.calibrated), Path(grid.run), keep=not dry_run)
    parts = plan(grid, behaviours, speed)
    if part:
        parts = [
            replace(p, prompts=p.prompts // part.of, seconds=p.seconds / part.of) for p in parts
        ]
    show_plan(grid, parts, behaviours)
    if not dry_run:
        start = time.monotonic()
        with ExitStack() as stack:
            make = None
            if engine == "ray":
                from pipeline.sweep.cluster_sweep import cluster

                make = stack.enter_context(cluster(grid, workers))
            result = whole(grid, parts, open_model=open_model, shard=part, make=make)
        show_result(grid, result)
        minutes = (time.monotonic() - start) / 60
        estimated = sum(part.seconds for part in parts) / 60
        click.echo(f"{minutes:.1f} minutes, estimated {estimated:.1f} from nothing")
        if result.failures:
            sys.exit(EXIT_PARTLY)


def show_plan(grid: SweepConfig, parts: list[Part], count: int) -> None:
    from commands.tables.study import parts_table
    from pipeline.sweep.plan import total_seconds

    models = f"{len(grid.sources)} sources, {len(grid.targets)} targets"
    click.echo(f"{count} behaviours, {models} -> {grid.run}")
    echo_table(parts_table, parts)
    minutes = total_seconds(parts) / 60
    click.echo(
        f"estimated time from nothing: {minutes:.0f} minutes (calibrated on the first model)"
    )


def show_result(grid: SweepConfig, result: SweepResult) -> None:
    from commands.tables.attacks import agreements_table, pivot_table
    from commands.tables.plane import classes_table, separability_table
    from core.files import read_rows
    from core.store import FAILURES
    from pipeline.plane_files import SEPARABILITY
    from pipeline.runs import classes_of

    run = Path(grid.run)
    for file, imported in result.imports.items():
        facts = [line for line in imported.lines() if not line.startswith("  ")]
        click.echo(f"{file}: {'; '.join(facts)}")
    echo_notes(result.notes)
    echo_table(pivot_table, result.matrix)
    if not as_json() and any(cell.corrected is not None for cell in result.matrix):
        echo_table(pivot_table, result.matrix, corrected=True)
    echo_table(agreements_table, result.agreements)
    if result.has_plane:
        echo_table(classes_table, classes_of(run), frames=["own"], anchors=False)
        echo_table(separability_table, read_rows(run / SEPARABILITY))
    for path in result.files:
        click.echo(path)
    if result.failures:
        failed = f"{len(result.failures)} cells failed (see {run / FAILURES})"
        click.echo(f"{failed}; the same command tries them again")


command = sweep
