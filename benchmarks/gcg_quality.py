"""Options that are not GCG against GCG at equal time. Usage:

    python -m benchmarks.gcg_quality --seconds 24 --out quality.jsonl

Every variant runs for the same wall time on the same behaviours and seeds, in turn, so that all see
the same machine; the order
rotates. Reported per variant, paired with plain GCG by behaviour and seed: the difference of the
best loss at the end, and how much sooner it reaches the worse of the two final losses, which both
reach (plain's time to it over the variant's; geometric mean). "gcg again" is plain GCG with another
random stream: what the method shows where there is no difference. Intervals: bootstrap over
behaviours and the seeds in them, 95 %. Rows already in the file are not run again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import click
import torch

from attacks.candidates import allowed_tokens
from attacks.gcg_search import GCGConfig, GCGState, run_gcg
from attacks.objective import TargetLoss
from attacks.slot import default_slot
from core.models import LoadedModel, load
from core.prompt import Renderer
from core.rows import Row
from core.text import aligned
from evaluation.behaviours import load_behaviours

PLAIN, AGAIN = "gcg", "gcg again"
VARIANTS: dict[str, Row] = {
    PLAIN: {},
    AGAIN: {},
    "momentum 0.5": {"momentum": 0.5},
    "merge 7": {"merge": 7},
    "probe sampling": {"draft": "half"},
}


class TimeIsUp(Exception):
    pass


def half_of(loaded: LoadedModel) -> LoadedModel:
    """The same model without every second block: a draft model where no smaller relative is at
    hand."""
    half = dataclasses.replace(
        loaded, model=copy.deepcopy(loaded.model), spec=f"{loaded.spec}, half of its blocks"
    )
    name = next(n for n, m in half.decoder.named_children() if m is half.blocks)
    kept = torch.nn.ModuleList(list(half.blocks)[::2])
    setattr(half.decoder, name, kept)
    for index, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  (no such attribute by type)
    half.config.num_hidden_layers = len(kept)
    return dataclasses.replace(half)  # a fresh one, that looks its blocks up anew


def search(
    loaded: LoadedModel,
    draft: LoadedModel,
    behaviour: Any,
    seed: int,
    width: int,
    options: Row,
    seconds: float,
) -> Row:
    """Best loss against time (seconds from the first step on) of one search."""
    slot = default_slot(
        Renderer(loaded),
        behaviour.request,
        behaviour.target_string,
        length=20,
        placement="{request} {suffix}",
        system=None,
    )
    config = GCGConfig(num_steps=10**6, search_width=width, topk=256, **options)
    objective = TargetLoss(loaded, slot)
    drafted = TargetLoss(draft, slot) if options.get("draft") else None
    allowed = allowed_tokens(loaded.tokenizer, loaded.embedding_table.shape[0])
    start, times, losses = time.perf_counter(), [], []

    def on_step(state: GCGState) -> None:
        times.append(time.perf_counter() - start)
        losses.append(state.best_loss)
        if times[-1] > seconds:
            raise TimeIsUp

    with contextlib.suppress(TimeIsUp):
        run_gcg(objective, slot, config, allowed, seed=seed, draft=drafted, on_step=on_step)
    return {"times": times[:-1] or times, "losses": losses[:-1] or losses}


def interval(
    values: list[list[float]], statistic: Any, draws: int = 2000
) -> tuple[float, float, float]:
    """Statistic of all values, and its 95 % interval from resampling the groups (behaviours) and
    the values in them."""
    generator = torch.Generator().manual_seed(0)

    def pick(items: list[Any]) -> list[Any]:
        return [
            items[i] for i in torch.randint(len(items), (len(items),), generator=generator).tolist()
        ]

    means = sorted(
        statistic([v for group in pick(values) for v in pick(group)]) for _ in range(draws)
    )
    whole = statistic([v for group in values for v in group])
    return whole, means[int(0.025 * draws)], means[int(0.975 * draws)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def geometric_mean(values: list[float]) -> float:
    return math.exp(mean([math.log(v) for v in values]))


def report(rows: list[Row]) -> str:
    by = {(r["variant"], r["behaviour"], r["seed"]): r for r in rows}
    behaviours = list(dict.fromkeys(r["behaviour"] for r in rows))
    seeds = sorted({r["seed"] for r in rows})
    header = (
        "variant",
        "steps",
        "final loss",
        "loss - gcg's",
        "95 %",
        "times as fast",
        "95 %",
        "lower loss",
    )
    lines: list[tuple[str, ...]] = [header]
    for variant in VARIANTS:
        pairs = [
            [
                (by[variant, b, s], by[PLAIN, b, s])
                for s in seeds
                if (variant, b, s) in by and (PLAIN, b, s) in by
            ]
            for b in behaviours
        ]
        flat = [pair for group in pairs for pair in group]
        pairs = [group for group in pairs if group]
        if not flat:
            continue
        gain = interval(
            [[v["losses"][-1] - p["losses"][-1] for v, p in group] for group in pairs], mean
        )
        speed = interval([[sooner(v, p) for v, p in group] for group in pairs], geometric_mean)
        steps, loss = (
            mean([len(v["times"]) for v, _ in flat]),
            mean([v["losses"][-1] for v, _ in flat]),
        )
        lower = sum(v["losses"][-1] < p["losses"][-1] for v, p in flat)
        other = variant != PLAIN
        lines.append(
            (
                variant,
                f"{steps:.1f}",
                f"{loss:.3f}",
                f"{gain[0]:+.3f}" if other else "",
                f"[{gain[1]:+.3f}, {gain[2]:+.3f}]" if other else "",
                f"{speed[0]:.2f}" if other else "",
                f"[{speed[1]:.2f}, {speed[2]:.2f}]" if other else "",
                f"{lower}/{len(flat)}" if other else "",
            )
        )
    return aligned(lines)


def sooner(variant: Row, plain: Row) -> float:
    """Plain's time to the worse of the two final losses over the variant's time to it."""
    goal = max(variant["losses"][-1], plain["losses"][-1])

    def reached(row: Row) -> float:
        return next(t for t, x in zip(row["times"], row["losses"], strict=True) if x <= goal)

    return reached(plain) / reached(variant)


@click.command()
@click.option("--model", default="embedded")
@click.option("--behaviours", "count", type=click.IntRange(1), default=4)
@click.option("--seeds", type=click.IntRange(1), default=5)
@click.option("--seconds", type=float, default=24.0, help="Wall time of each search.")
@click.option("--width", type=click.IntRange(1), default=64)
@click.option(
    "--variant", "variants", type=click.Choice(list(VARIANTS)), multiple=True, help="[default: all]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Rows as JSON lines; goes on from them.",
)
def main(
    model: str,
    count: int,
    seeds: int,
    seconds: float,
    width: int,
    variants: tuple[str, ...],
    out: Path,
) -> None:
    """Time to the same loss."""
    chosen = list(variants) or list(VARIANTS)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    about = {"model": model, "width": width, "seconds": seconds}
    rows = [row for row in rows if all(row[key] == value for key, value in about.items())]
    done = {(r["variant"], r["behaviour"], r["seed"]) for r in rows}
    loaded = load(model)
    draft = half_of(loaded)
    behaviours = load_behaviours(label="harmful", splits=["test"])
    picked = behaviours[:: max(1, len(behaviours) // count)][:count]
    for seed in range(seeds):
        for number, behaviour in enumerate(picked):
            turn = (seed + number) % len(chosen)
            for variant in chosen[turn:] + chosen[:turn]:
                if (variant, behaviour.behaviour_id, seed) in done:
                    continue
                stream = seed + 1000 * (variant == AGAIN)
                result = search(loaded, draft, behaviour, stream, width, VARIANTS[variant], seconds)
                cell = {"variant": variant, "behaviour": behaviour.behaviour_id, "seed": seed}
                rows.append(about | cell | result)
                with open(out, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                click.echo(
                    f"{variant}, {behaviour.behaviour_id}, seed {seed}: {len(result['times'])} "
                    "steps, "
                    f"loss {result['losses'][-1]:.3f}",
                    err=True,
                )
    click.echo(
        f"{loaded.describe()}, width {width}, {seconds:.0f} s each, {len(picked)} behaviours, "
        f"{seeds} seeds"
    )
    click.echo(report(rows))


if __name__ == "__main__":
    main()
