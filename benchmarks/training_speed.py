"""Seconds of an update by part, and how much of R2D2's attack is matrix products.

    python -m benchmarks.training_speed r2d2 --updates 3

For every arm named: mean seconds of an update by part, without the first. For ``r2d2`` also the
share of the attack's core-seconds that its matrix products take, over all threads: a product that
runs on one of two threads side by side counts once, one that runs on both counts twice.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from core.memory import PEAK
from core.models import ModelHandle
from core.store import RunFolder
from core.text import aligned
from training.devices import Devices
from training.loop import Run, seeded
from training.registry import ARMS
from training.requests import requests_of

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn::_linear_pointwise")
ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)


@click.command()
@click.argument("arms", nargs=-1, required=True)
@click.option("--model", default="embedded")
@click.option("--updates", type=click.IntRange(2), default=3)
@click.option("--replies", type=click.Path(path_type=Path), help="replies.jsonl of an earlier run")
def main(arms: tuple[str, ...], model: str, updates: int, replies: Path | None) -> None:
    """Time the arms, one after another."""
    for name in arms:
        arm = ARMS.get(name)
        config = arm.make_config({}, preset="small")
        with tempfile.TemporaryDirectory() as path, RunFolder(path) as folder, seeded(0):
            if replies:
                (folder.path / "replies.jsonl").write_bytes(replies.read_bytes())
            requests = requests_of("demonstration", arm.needs)
            run = Run(arm, ModelHandle(model), requests, config, folder, Devices())
            run.adapted.tuned.train()
            for step in range(updates):
                run.update(step)
            rows = run.seconds[1:]
            parts = {k: sum(r.get(k, 0.0) for r in rows) / len(rows) for k in rows[-1]}
            parts.pop("step")
            parts.pop(PEAK)
            click.echo(
                aligned([[name, *parts], ["seconds", *(f"{v:.2f}" for v in parts.values())]])
            )
            if name == "r2d2":
                click.echo(product_share(run, updates))


def product_share(run: Run, update: int) -> str:
    """The attack of one update under a profiler that sees all threads."""
    r2d2 = run.method.losses.__self__  # type: ignore[attr-defined]
    threads = torch.get_num_threads()
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with run.adapted.merged(reduced=run.config.precision == "bfloat16"):
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as seen:
            for number in r2d2.pool.drawn(update, r2d2.config.cases):
                r2d2.pool.attack(number, update, r2d2.gcg)
        wall = time.perf_counter() - start
    main_thread = {min(e.thread for e in seen.events())}
    spent = {"products": 0.0, "attention": 0.0}
    for event in seen.events():
        kind = (
            "products" if event.name in PRODUCTS else "attention" if event.name in ATTENTION else ""
        )
        if kind:
            cores = threads if event.thread in main_thread else 1
            spent[kind] += cores * event.self_cpu_time_total / 1e6
    whole = wall * threads
    shares = ", ".join(f"{kind} {value / whole:.0%}" for kind, value in spent.items())
    return f"attack: {wall:.2f} s; of its core-seconds {shares}"


if __name__ == "__main__":
    main()
