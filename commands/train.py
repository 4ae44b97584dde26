"""The command train: checkpoints, which are targets like any other."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import SEED, CleanGroup, quiet_libraries

PAPER_CHECKPOINTS = (50, 100, 250)
"""Steps that the papers save at, besides the last one."""


@click.group(cls=CleanGroup)
def train() -> None:
    """Train checkpoints, which are targets like any other."""


@train.command()
@click.option("--model", default="embedded", help="Base model (a model spec).")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the checkpoints.",
)
@click.option(
    "--behaviours",
    default="demonstration",
    help="Behaviours with splits; the training split is used.",
)
@click.option("--steps", type=click.IntRange(1), default=500, help="Optimiser steps.")
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=int,
    help="Step to save at; repeatable [default: those of 50, 100, 250 within the steps, and the "
    "last]",
)
@click.option("--batch-size", type=click.IntRange(1), default=16)
@click.option("--learning-rate", type=float, default=2e-5)
@click.option("--warmup", type=click.IntRange(0), default=0, help="Steps of linear warm-up.")
@click.option("--rank", type=click.IntRange(1), default=64, help="LoRA rank.")
@click.option("--alpha", type=click.IntRange(1), default=16, help="LoRA alpha.")
@click.option("--dropout", type=click.FloatRange(0, 1), default=0.1, help="LoRA dropout.")
@click.option(
    "--all-linear", is_flag=True, help="LoRA on all linear layers, not on attention alone."
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="Of the products; bfloat16 is faster where the machine has it.",
)
@click.option(
    "--reply-tokens",
    type=click.IntRange(1),
    default=48,
    help="New tokens of the base model's own replies to harmless requests.",
)
@SEED
@quiet_libraries
def sft(
    model: str,
    out: Path,
    behaviours: str,
    steps: int,
    checkpoints: tuple[int, ...],
    batch_size: int,
    learning_rate: float,
    warmup: int,
    rank: int,
    alpha: int,
    dropout: float,
    all_linear: bool,
    precision: str,
    reply_tokens: int,
    seed: int,
) -> None:
    """Fine-tune a model to refuse harmful requests (LoRA).

    \b
    Example, the demo's training:
      python cli.py train sft --out runs/sft --steps 24 --batch-size 8 --learning-rate 1e-3 \\
          --checkpoint 6 --checkpoint 12 --checkpoint 24 --warmup 2 --rank 16 --alpha 32 \\
          --dropout 0
    """
    from pipeline.train import train_sft
    from training.sft import SFTConfig

    saved = checkpoints or [c for c in PAPER_CHECKPOINTS if c < steps] + [steps]
    config = SFTConfig(
        num_steps=steps,
        checkpoints=tuple(sorted(set(saved))),
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        all_linear=all_linear,
        precision=precision,
        reply_tokens=reply_tokens,
        seed=seed,
    )
    result = train_sft(model, out, config, behaviours)
    for path in result.checkpoints:
        click.echo(f"{model}+{path}")
    click.echo("step,loss,learning_rate")
    for row in result.losses:
        click.echo(f"{int(row['step'])},{row['loss']:.6f},{row['learning_rate']:.3e}")


command = train
