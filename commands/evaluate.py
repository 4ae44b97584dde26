"""The command evaluate: what checkpoints cost and gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.options import RUN, echo_notes, file_options, open_model, quiet_libraries
from commands.output import echo_table, json_option
from commands.setting_options import given_settings, setting_options
from commands.types import FilePath, count
from evaluation.budget import EvaluateConfig
from evaluation.judges.registry import DEFAULT_JUDGE


def budget_options(command: Any) -> Any:
    """One option per setting of the budget."""
    for option in reversed(setting_options(EvaluateConfig)):
        command = option(command)
    return command


@click.command()
@RUN
@click.option("--model", "models", multiple=True, required=True, help="Model spec; repeatable.")
@click.option(
    "--attacks",
    multiple=True,
    type=FilePath(),
    help="Run whose attacked prompts are replayed; repeatable.",
)
@click.option("--base", help="Base for KL and change [default: the first, without its adapter]")
@click.option("--behaviours", default="demonstration", help="Requests; see gcg.")
@click.option(
    "--usability",
    multiple=True,
    help="A further set whose safe requests are asked, such as xstest; repeatable.",
)
@click.option(
    "--judge",
    "judges",
    multiple=True,
    default=(DEFAULT_JUDGE,),
    help="See transfer; the first one decides.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="Task of lm-evaluation-harness, such as mmlu; repeatable.",
)
@click.option("--task-limit", type=count(), help="Examples of each task.")
@budget_options
@file_options
@json_option
@quiet_libraries
def evaluate(
    run: Path,
    models: tuple[str, ...],
    attacks: tuple[Path, ...],
    base: str | None,
    behaviours: str,
    usability: tuple[str, ...],
    judges: tuple[str, ...],
    tasks: tuple[str, ...],
    task_limit: int | None,
    **budget: Any,
) -> None:
    """Measure robustness, usability, capability and integrity of models.

    One row per model: success of plain requests, of the frozen prompts of other runs and of GCG
    made anew on the model; refusals of safe requests that it was not trained on; instructions that
    a rule can check; KL to the base; and how much of the change inside lies outside the H-R plane.

    \b
    Example:
      python cli.py evaluate --run runs/evaluation --attacks runs/suite --model embedded \\
          --model embedded+runs/sft/step-100 --model embedded+runs/sft/step-200
    """
    from commands.tables.evaluate import evaluation_table
    from pipeline.evaluate import Evaluation
    from pipeline.evaluate import evaluate as stage

    config = EvaluateConfig(**given_settings(EvaluateConfig, budget))
    asked = Evaluation(behaviours, attacks, usability, judges, tasks, task_limit, config)
    result = stage(run, models, asked, base=base, open_model=open_model)
    echo_notes(result.notes)
    echo_table(evaluation_table, result.rows)
    for file in result.files:
        click.echo(str(file))


command = evaluate
