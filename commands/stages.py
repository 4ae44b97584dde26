"""Commands that run a stage on a run folder: transfer, directions, plane, train, demo."""

from __future__ import annotations

from pathlib import Path

import click

from commands.common import RUN, Group, quiet_libraries


@click.command()
@RUN
@click.option(
    "--target", "targets", multiple=True, required=True, help="Target model (a model spec); repeatable."
)
@click.option(
    "--judge", "judges", multiple=True, default=("refusal_phrases", "target_prefix"),
    help="refusal_phrases, target_prefix, classifier:MODEL[#LABEL], judgezoo:NAME; the first one decides.",
)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), default=64)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0: greedy.")
@click.option("--seed", type=int, default=0, help="Of the sampling.")
@click.option("--batch-size", type=click.IntRange(1), default=16)
@quiet_libraries
def transfer(run: Path, targets: tuple[str, ...], judges: tuple[str, ...], max_new_tokens: int, temperature: float,
             seed: int, batch_size: int) -> None:  # fmt: skip
    """Replay frozen prompts on targets and judge.

    Every artifact of the run is sent verbatim; replies and judgements are kept.

    \b
    Example:
      python cli.py transfer --run runs/first --target embedded --target embedded+runs/demo/checkpoints/step-12
    """
    from pipeline.transfer import transfer as stage
    from transfer.replay import ReplayConfig

    click.echo(stage(run, targets, judges, ReplayConfig(max_new_tokens, temperature, seed), batch_size))


@click.command()
@RUN
@click.option("--model", "models", multiple=True, required=True, help="Model spec; repeatable.")
@click.option("--estimator", type=click.Choice(["harc", "zhao", "both"]), default="both")
@click.option("--contrast", default="demonstration", help="Behaviours with labels harmful and harmless.")
@click.option(
    "--split", "splits", multiple=True,
    help="Only these splits [default: train and validation of the demonstration set, else all]",
)  # fmt: skip
@click.option("--resamples", type=click.IntRange(20), default=200, help="Bootstrap samples and null draws.")
@click.option("--system", help="System prompt.")
@click.option("--seed", type=int, default=0)
@quiet_libraries
def directions(run: Path, models: tuple[str, ...], estimator: str, contrast: str, splits: tuple[str, ...],
               resamples: int, system: str | None, seed: int) -> None:  # fmt: skip
    """Estimate directions at every layer.

    Harmfulness and refusal, by difference of means, with intervals and nulls.

    \b
    Example:
      python cli.py directions --run runs/first --model embedded --estimator harc
    """
    from evaluation.behaviours import DEMONSTRATION
    from pipeline.directions import DirectionsConfig
    from pipeline.directions import directions as stage

    estimators = ("harc", "zhao") if estimator == "both" else (estimator,)
    splits = splits or (("train", "validation") if contrast == DEMONSTRATION else ())
    config = DirectionsConfig(contrast, splits, resamples=resamples, seed=seed, system_prompt=system)
    stage(run, models, estimators, config)


@click.command()
@RUN
@click.option("--target", "targets", multiple=True, help="Target model; repeatable [default: all of the run]")
@click.option("--base", help="Model of the base frame [default: the first target]")
@click.option("--estimator", type=click.Choice(["harc", "zhao"]), default="harc")
@click.option("--layer", type=click.IntRange(0), help="Layer [default: the base model's best layer score]")
@click.option("--anchors", default="demonstration", help="Plain prompts drawn as anchors.")
@click.option(
    "--anchor-split", "anchor_splits", multiple=True,
    help="Only these splits [default: test of the demonstration set, else all]",
)  # fmt: skip
@quiet_libraries
def plane(run: Path, targets: tuple[str, ...], base: str | None, estimator: str, layer: int | None, anchors: str,
          anchor_splits: tuple[str, ...]) -> None:  # fmt: skip
    """Project, export and draw the plane.

    Writes CSV, JSONL, Parquet, PNG and HTML into the run folder, in place of an earlier plane.

    \b
    Example:
      python cli.py plane --run runs/first
    """
    from evaluation.behaviours import DEMONSTRATION
    from pipeline.plane import plane as stage
    from pipeline.reports import classes_table, success_table

    written = stage(
        run,
        targets,
        base=base,
        estimator=estimator,
        layer=layer,
        anchors=anchors,
        anchor_splits=anchor_splits or (("test",) if anchors == DEMONSTRATION else ()),
    )
    click.echo(classes_table(run))
    if predicted := success_table(run):
        click.echo(f"success within attack classes\n{predicted}")
    for path in written:
        click.echo(path)


@click.group(cls=Group)
def train() -> None:
    """Train checkpoints, which are targets like any other."""


@train.command()
@click.option("--model", default="embedded", help="Base model (a model spec).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the checkpoints.")
@click.option(
    "--behaviours", default="demonstration", help="Behaviours with splits; the training split is used."
)
@click.option("--steps", type=click.IntRange(1), default=500, help="Optimiser steps.")
@click.option(
    "--checkpoint", "checkpoints", multiple=True, type=int,
    help="Step to save at; repeatable [default: those of 50, 100, 250, 500 within the steps, and the last]",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=16)
@click.option("--learning-rate", type=float, default=2e-5)
@click.option("--warmup", type=click.IntRange(0), default=0, help="Steps of linear warm-up.")
@click.option("--rank", type=click.IntRange(1), default=64, help="LoRA rank.")
@click.option("--alpha", type=click.IntRange(1), default=16, help="LoRA alpha.")
@click.option("--dropout", type=click.FloatRange(0, 1), default=0.1, help="LoRA dropout.")
@click.option("--seed", type=int, default=0)
@quiet_libraries
def sft(model: str, out: Path, behaviours: str, steps: int, checkpoints: tuple[int, ...], batch_size: int,
        learning_rate: float, warmup: int, rank: int, alpha: int, dropout: float, seed: int) -> None:  # fmt: skip
    """Fine-tune a model to refuse harmful requests (LoRA).

    \b
    Example, the demo's training:
      python cli.py train sft --out runs/sft --steps 24 --checkpoint 6 --checkpoint 12 --checkpoint 24 \\
          --batch-size 8 --learning-rate 1e-3 --warmup 2 --rank 16 --alpha 32 --dropout 0
    """
    from pipeline.training import train_sft
    from training.sft import SFTConfig

    config = SFTConfig(
        num_steps=steps,
        checkpoints=tuple(sorted({*(checkpoints or [c for c in (50, 100, 250) if c < steps] + [steps])})),
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        seed=seed,
    )
    for path in train_sft(model, out, config, behaviours):
        click.echo(f"{model}+{path}")
    click.echo((out / "losses.csv").read_text().strip())


@click.command()
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/demo"), help="Run folder.")
@quiet_libraries
def demo(run: Path) -> None:
    """Run every stage on the embedded model.

    Trains refusing checkpoints, attacks one, replays, estimates directions, draws the plane. Under 15 minutes on 2 cores.

    \b
    Example:
      python cli.py demo
    """
    import time

    from pipeline.demo import demo as whole

    start = time.monotonic()
    for path in whole(run):
        click.echo(path)
    click.echo(f"{(time.monotonic() - start) / 60:.1f} minutes; python cli.py verify --run {run}")


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the plan and the estimated time only.")
@quiet_libraries
def sweep(config: Path, dry_run: bool) -> None:
    """Run a whole grid from a TOML file.

    Behaviours x attacks x sources, imports, then transfer, directions and plane, in one run folder. The plan is printed first; the
    same command goes on after a stop and tries failed cells again.

    \b
    Examples:
      python cli.py sweep examples/sweep.toml --dry-run
      python cli.py sweep examples/sweep.toml
    """
    from pipeline.sweep import sweep as whole
    from pipeline.sweep_config import read_config

    whole(read_config(config), dry_run=dry_run)


COMMANDS = (transfer, directions, plane, sweep, train, demo)
