"""The command study: a whole experiment from a TOML file, with one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from commands.options import echo_notes, open_model, quiet_libraries
from commands.output import echo_table, json_option
from commands.types import FilePath

if TYPE_CHECKING:
    from study.experiment import Experiment, ExperimentResult
    from study.experiment_plan import Stage

REPORT, MADE_BY = "REPORT.md", "Made by `study"


@click.command()
@click.argument("config", type=FilePath())
@click.option("--dry-run", is_flag=True, help="Print the plan and its time here only.")
@json_option
@quiet_libraries
def study(config: Path, dry_run: bool) -> None:
    """Run a whole experiment from a TOML file.

    Trains arms and seeds, attacks, evaluates, looks inside every checkpoint, decides the claims,
    and writes one report with its pictures. The same command goes on after a stop.

    \b
    Examples:
      python cli.py study examples/safety_geometry.toml --dry-run
      python cli.py study examples/safety_geometry.toml
    """
    from study.experiment import experiment_run
    from study.experiment_file import read_experiment
    from study.experiment_plan import measured, stages

    experiment = read_experiment(config)
    refuse_foreign_report(experiment.folder / REPORT)
    planned = stages(experiment, measured(experiment, open_model))
    show_plan(experiment, planned)
    if dry_run:
        return
    result = experiment_run(
        experiment, open_model=open_model, on_step=lambda step: click.echo(f"{step} ...")
    )
    report = write_report(config, experiment, result)
    echo_notes(result.notes)
    for step, seconds in result.seconds.items():
        estimated = sum(stage.seconds for stage in planned if stage.step == step) / 60
        click.echo(f"{step}: {seconds / 60:.1f} minutes, estimated {estimated:.1f} from nothing")
    click.echo(str(report))


def refuse_foreign_report(path: Path) -> None:
    """A report that this command did not write is the user's."""
    from core.errors import AttackPlaneError
    from core.files import refuse_link

    refuse_link(path)
    if path.exists() and MADE_BY not in path.read_text(encoding="utf-8", errors="replace"):
        raise AttackPlaneError(
            "a file that study did not write stands where its report would",
            where=path,
            remedy="move it away, or give another run folder",
        )


def show_plan(experiment: Experiment, planned: list[Stage]) -> None:
    from commands.tables.study import stages_table

    models = 1 + len(experiment.checkpoints())
    hours = sum(stage.seconds for stage in planned) / 3600
    echo_table(stages_table, planned, title=f"{models} models -> {experiment.run}")
    click.echo(f"estimated time from nothing: {hours:.1f} hours (calibrated on the reference)")


def write_report(config: Path, experiment: Experiment, result: ExperimentResult) -> Path:
    """``REPORT.md`` in the run folder: the tables of all stages, and their pictures."""
    from commands.tables.evaluate import evaluation_table
    from commands.tables.study import claims_table
    from commands.tables.trajectory import anchors_table, predictions_table, trajectory_table
    from core.files import write_atomically

    inside = result.trajectory
    parts = [f"# {experiment.folder.name}", f"{MADE_BY} {config}`."]

    def section(title: str, table: str, pictures: list[Path]) -> None:
        indented = "\n".join(f"    {line}".rstrip() for line in table.splitlines())
        images = [f"![{p.stem}]({p.relative_to(experiment.folder)})" for p in pictures]
        parts.extend([f"## {title}", indented, *images])

    def images(files: list[Path]) -> list[Path]:
        return [file for file in files if file.suffix == ".png"]

    section(
        "How checkpoints behave",
        evaluation_table(result.evaluation.rows),
        images(result.evaluation.files),
    )
    section("What changes inside", trajectory_table(inside.rows), images(inside.files))
    if inside.anchors:
        section("Aligned anchors, ASR by what is ablated", anchors_table(inside.anchors), [])
    if inside.predictions:
        section("What predicts transfer", predictions_table(inside.predictions), [])
    if inside.claims:
        section("Claims about trainings", claims_table(inside.claims), [])
    if result.claims:
        section("Claims about checkpoints", claims_table(result.claims.claims), [])
        parts += [
            f"![claims]({p.relative_to(experiment.folder)})" for p in images(result.claims.files)
        ]
    parts += ["## Notes", *(f"- {note}" for note in result.notes)]
    path = experiment.folder / REPORT
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path


command = study
