"""Commands that look into a model: claims, intervene, layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.common import default_run, quiet_libraries

if TYPE_CHECKING:
    from pipeline.study import StudyConfig


RUN_FOLDER = click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Run folder [default: runs/study-MODEL-HASH, the same for claims, intervene and layers]",
)


def study_run(run: Path | None, models: tuple[str, ...], config: StudyConfig) -> Path:
    """The folder given, or one for these models and settings."""
    from dataclasses import asdict

    return run or default_run("study", models[0], [models, asdict(config)])


def study_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a study of a model is made from; ``study_config`` reads them."""
    for option in (
        click.option("--seed", type=int, default=0),
        click.option("--system", help="System prompt."),
        click.option("--controls", type=click.IntRange(2), default=5, help="Random directions of each kind of control."),
        click.option("--resamples", type=click.IntRange(20), default=200, help="Bootstrap samples and null draws of directions."),
        click.option("--estimator", type=click.Choice(["auto", "harc", "zhao"]), default="auto",
                     help="Of the refusal contrast; auto: zhao where the model refuses and accepts enough."),
        click.option("--held-out", default="demonstration", help="Behaviours that effects are measured on."),
        click.option("--contrast", default="demonstration", help="Behaviours with labels harmful and harmless."),
        click.option("--model", "models", multiple=True, required=True, help="Model spec; repeatable."),
    ):  # fmt: skip
        command = option(command)
    return command


def study_config(contrast: str, held_out: str, **others: Any) -> StudyConfig:
    """Splits are those of the demonstration set; a file is taken whole."""
    from evaluation.behaviours import DEMONSTRATION
    from pipeline.study import StudyConfig

    return StudyConfig(
        contrast=contrast,
        splits=("train", "validation") if contrast == DEMONSTRATION else (),
        held_out=held_out,
        held_out_splits=("test",) if held_out == DEMONSTRATION else (),
        **others,
    )


@click.command()
@RUN_FOLDER
@study_options
@click.option("--claims", "numbers", help="Comma-separated numbers, for example 1,2,7 [default: all]")
@quiet_libraries
def claims(run: Path | None, models: tuple[str, ...], contrast: str, held_out: str, estimator: str, resamples: int, controls: int,
           system: str | None, seed: int, numbers: str | None) -> None:  # fmt: skip
    """Confirm or refute published claims on a model.

    Each with its measurement, interval, nulls and verdict: holds, fails or undecided. Claims 12 to 14 are about attacks: they take
    the prompts and replies of the run, or make the prompt-level attacks if it has none, and draw the run's plane anew. Writes claims.jsonl
    and claims.png; claims of other models and numbers stay in them.

    \b
    Examples:
      python cli.py claims --run runs/claims --model embedded+runs/demo/checkpoints/step-24
      python cli.py claims --model embedded --claims 1,2,7
    """
    from pipeline.claims import claims as stage
    from pipeline.claims import claims_table, coupling_table

    try:
        wanted = [int(n) for n in numbers.split(",")] if numbers else []
    except ValueError as error:
        raise click.BadParameter(f"{numbers!r}: expected numbers, for example 1,2,7") from error
    config = study_config(contrast, held_out, estimator=estimator, resamples=resamples, controls=controls,
                          system_prompt=system, seed=seed)  # fmt: skip
    path = study_run(run, models, config)
    found = stage(path, models, wanted, config)
    for number, title in dict.fromkeys((c.number, c.title) for c in found):
        click.echo(f"{number}. {title}")
    click.echo(claims_table(found))
    if coupled := coupling_table(found):
        click.echo(f"coupling of the carriers, effective rank of their fields\n{coupled}")
    for c in found:
        click.echo(f"{c.number} {c.model}: {c.note}")
    for name in ("claims.jsonl", "claims.png"):
        click.echo(path / name)


@click.command()
@RUN_FOLDER
@study_options
@quiet_libraries
def layers(run: Path | None, models: tuple[str, ...], contrast: str, held_out: str, estimator: str, resamples: int, controls: int,
           system: str | None, seed: int) -> None:  # fmt: skip
    """Profile directions over positions and layers.

    Separation, reliability, angles and nulls at every position and layer; response-side directions; the layer that each published
    criterion takes; several models of one width are compared. Writes layers_*.jsonl and layers.png.

    \b
    Example:
      python cli.py layers --run runs/claims --model embedded --model embedded+runs/demo/checkpoints/step-24
    """
    from pipeline.layers import layers as stage

    config = study_config(contrast, held_out, estimator=estimator, resamples=resamples, controls=controls,
                          system_prompt=system, seed=seed)  # fmt: skip
    path = study_run(run, models, config)
    click.echo(stage(path, models, config))
    click.echo(path / "layers.png")


@click.command()
@RUN_FOLDER
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
    type=float,
    help="Lambda; steering in units of the refusal carrier's class difference. Repeatable [default: 1]",
)
@click.option("--sweep", is_flag=True, help="The papers' strengths: -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4.")
@click.option(
    "--layers",
    "at",
    help="Comma-separated residual layers, or all [default: all to ablate, the refusal carrier's to steer]",
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
    help="Held-out prompts; repeatable.",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first so many prompts of each label.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=20)
@quiet_libraries
def intervene(run: Path | None, models: tuple[str, ...], contrast: str, held_out: str, estimator: str, resamples: int, controls: int,
              system: str | None, seed: int, modes: tuple[str, ...], operation: str, strengths: tuple[float, ...], sweep: bool,
              at: str | None, where: str, labels: tuple[str, ...], limit: int | None, max_new_tokens: int) -> None:  # fmt: skip
    """Ablate or steer directions, against controls.

    Vectors are the best carriers of harmfulness and refusal, found on the contrast prompts; effects are measured on held-out
    ones: success, refusals, degenerate replies, log-probability of a refusal, KL of the next token. Controls: random directions, the
    carrier of a wrong layer and of a wrong position, and random directions that move every token exactly as far.
    Writes interventions.jsonl, interventions_summary.jsonl and interventions.png, in place of earlier ones.

    \b
    Examples:
      python cli.py intervene --run runs/claims --model embedded+runs/demo/checkpoints/step-24
      python cli.py intervene --run runs/claims --model embedded --mode R --operation steer --sweep --label harmless
    """
    from pipeline.intervene import SWEEP, Plan, effects_table
    from pipeline.intervene import intervene as stage

    try:
        chosen = None if at is None else () if at == "all" else tuple(int(n) for n in at.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{at!r}: expected layers, for example 12,13, or all") from error
    if sweep and strengths:
        raise click.UsageError("--sweep and --strength exclude each other")
    config = study_config(contrast, held_out, estimator=estimator, resamples=resamples, controls=controls,
                          system_prompt=system, seed=seed)  # fmt: skip
    plan = Plan(
        modes,
        operation,
        SWEEP if sweep else strengths or (1.0,),
        chosen,
        where,
        labels,
        limit,
        max_new_tokens,
    )
    path = study_run(run, models, config)
    click.echo(effects_table(stage(path, models, config, plan)))
    for name in ("interventions.jsonl", "interventions_summary.jsonl", "interventions.png"):
        click.echo(path / name)


COMMANDS = (claims, intervene, layers)
