"""Commands that look into a model: claims, intervene, layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.common import RUN, quiet_libraries

if TYPE_CHECKING:
    from pipeline.study import StudyConfig


def study_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a study of a model is made from; ``study_config`` reads them."""
    for option in (
        click.option("--seed", type=int, default=0),
        click.option("--system", help="System prompt."),
        click.option("--controls", type=click.IntRange(2), default=5, help="Random directions of each kind of control."),
        click.option("--resamples", type=click.IntRange(20), default=200, help="Bootstrap samples and null draws."),
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
@RUN
@study_options
@click.option("--claims", "numbers", help="Comma-separated numbers, for example 1,2,7 [default: all]")
@quiet_libraries
def claims(run: Path, models: tuple[str, ...], contrast: str, held_out: str, estimator: str, resamples: int, controls: int,
           system: str | None, seed: int, numbers: str | None) -> None:  # fmt: skip
    """Confirm or refute published claims on a model.

    Each with its measurement, interval, nulls and verdict: holds, fails or undecided. Claims 12 to 14 are about attacks: they take
    the prompts and replies of the run, or make the prompt-level attacks if it has none. Writes claims.jsonl and claims.png.

    \b
    Examples:
      python cli.py claims --run runs/claims --model embedded+runs/demo/checkpoints/step-24
      python cli.py claims --run runs/claims --model embedded --claims 1,2,7
    """
    from pipeline.claims import claims as stage
    from pipeline.claims import claims_table

    try:
        wanted = [int(n) for n in numbers.split(",")] if numbers else []
    except ValueError as error:
        raise click.BadParameter(f"{numbers!r}: expected numbers, for example 1,2,7") from error
    config = study_config(contrast, held_out, estimator=estimator, resamples=resamples, controls=controls,
                          system_prompt=system, seed=seed)  # fmt: skip
    found = stage(run, models, wanted, config)
    for number, title in dict.fromkeys((c.number, c.title) for c in found):
        click.echo(f"{number}. {title}")
    click.echo(claims_table(found))
    for c in found:
        click.echo(f"{c.number} {c.model}: {c.note}")
    for name in ("claims.jsonl", "claims.png"):
        click.echo(run / name)


COMMANDS = (claims,)
