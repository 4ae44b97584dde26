"""Options of the commands that study a model: claims, layers, intervene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from commands.options import JUDGE, SEED, SYSTEM, TEMPLATE, default_run, file_options
from commands.types import FilePath, count
from core.rows import Row

if TYPE_CHECKING:
    from study.config import StudyConfig


def study_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a study of a model is made from; ``study_config`` and ``study_run`` read them."""
    command = file_options(command)
    for option in (
        SEED,
        SYSTEM,
        TEMPLATE,
        JUDGE,
        click.option(
            "--outputs",
            is_flag=True,
            help="Ablate what attention and MLP write too, as Arditi does.",
        ),
        click.option(
            "--resamples",
            type=count(20),
            default=200,
            help="Bootstrap samples and null draws of directions.",
        ),
        click.option(
            "--estimator",
            type=click.Choice(["auto", "harc", "zhao"]),
            default="auto",
            help="Estimator of the refusal direction; auto: zhao where there are enough refusals.",
        ),
        click.option(
            "--held-out",
            default="demonstration",
            help="Behaviours that effects are measured on.",
        ),
        click.option(
            "--prompts",
            type=count(4),
            default=24,
            help="Held-out prompts of each label, spread over categories.",
        ),
        click.option(
            "--contrast",
            default="demonstration",
            help="Behaviours with labels harmful and harmless.",
        ),
        click.option(
            "--model", "models", multiple=True, required=True, help="Model spec; repeatable."
        ),
        click.option(
            "--run",
            type=FilePath(),
            help="Run folder [default: runs/study-MODEL-HASH, the same for claims, intervene and "
            "layers]",
        ),
    ):
        command = option(command)
    return command


def study_config(options: Row) -> StudyConfig:
    """Splits are those of the demonstration set; a file is taken whole. Takes its options out."""
    from evaluation.behaviours import CONTRAST_SPLITS, HELD_OUT_SPLITS
    from pipeline.contrast_reading import splits_of
    from study.study import StudyConfig

    contrast, held_out = options.pop("contrast"), options.pop("held_out")
    names = ("estimator", "resamples", "judge", "seed", "outputs", "template")
    return StudyConfig(
        contrast=contrast,
        splits=splits_of(contrast, (), CONTRAST_SPLITS),
        held_out=held_out,
        held_out_splits=splits_of(held_out, (), HELD_OUT_SPLITS),
        held_out_prompts=options.pop("prompts"),
        system_prompt=options.pop("system"),
        **{name: options.pop(name) for name in names},
    )


def study_run(run: Path | None, models: tuple[str, ...], config: StudyConfig) -> Path:
    """The folder given, or one for these models and settings."""
    return run or default_run("study", models[0], [models, asdict(config)])
