"""Which search reaches a low loss soonest, at equal operations and equal time; nanogcg among them.

Usage:

    python -m benchmarks.gcg_quality --out quality.jsonl                     (hours; goes on)
    python -m benchmarks.gcg_quality --out quality.jsonl --report            (of what is there)
    python -m benchmarks.gcg_quality --out quality.jsonl --method gcg --method merge --seconds 30

Tasks are random targets of ten tokens behind a suffix of fifteen, where nothing harmful is asked
(as in Claudini, arXiv 2603.24511), and built-in behaviours. Each method searches each task with
each seed for so many seconds (``--seconds``; ours for less with ``--ours``, where only the time to
the reference is asked), one after the other, in turn. Noted are time, operations (2 a
parameter and token forward, 4 backward; nanogcg's from what it feeds) and best loss after every
step.

    time to the reference   seconds until the best loss is what nanogcg has after its whole time;
                            geometric mean over tasks and seeds, a run that never gets there counts
                            with the reference's whole time, if that is longer than its own (so it
                            is a lower bound, and said)
    loss at equal time      best loss at the shortest whole time of all
    loss at equal work      best loss at the fewest operations that all methods reach

Intervals are 95 %, from resampling tasks and the seeds in them.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from attacks.adc import ADCConfig
from attacks.adc_search import ADCResult, run_adc
from attacks.candidates import allowed_tokens
from attacks.gcg import GCGConfig
from attacks.gcg_search import GCGState, run_gcg
from attacks.nanogcg_engine import operations_of, reference
from attacks.objective import TargetLoss
from attacks.rough import RoughModel
from attacks.screening import gains, rough_copy
from attacks.slot import SuffixSlot, make_slot
from benchmarks.measure import device_name
from core.models import LoadedModel, load
from core.prompt import Renderer
from core.rows import Row
from core.text import aligned
from evaluation.behaviours import load_behaviours

NANO = "nanogcg"
FOREVER = 10**6
METHODS: dict[str, Row] = {
    NANO: {},
    "nanogcg 64": {"search_width": 64},
    "gcg exact": {"exact": True},
    "gcg": {},
    "gcg 64": {"search_width": 64},
    "gcg 32": {"search_width": 32},
    "momentum": {"search_width": 64, "momentum": 0.5},
    "merge": {"search_width": 64, "merge": 7},
    "lsgm": {"search_width": 64, "lsgm": 0.5},
    "positions": {"search_width": 64, "positions": "gradient"},
    "lsgm merge": {"search_width": 64, "lsgm": 0.5, "merge": 7},
    "all": {"search_width": 64, "lsgm": 0.5, "merge": 7, "positions": "gradient"},
    "adc": {"starts": 4},
}
TARGET, SUFFIX = 10, 15
"""Tokens of a random target, and of the suffix before it."""
NEUTRAL = "Continue the text."


class TimeIsUp(Exception):
    pass


@dataclass(frozen=True)
class Problem:
    name: str
    request: str
    target: str
    suffix: int


def problems(loaded: LoadedModel, random: int, behaviours: int) -> list[Problem]:
    """Random targets, and behaviours of the demonstration set."""
    ids = allowed_tokens(loaded.tokenizer, loaded.embedding_table.shape[0]).nonzero()[:, 0]
    found = []
    for n in range(random):
        generator = torch.Generator().manual_seed(n)
        drawn = ids[torch.randint(len(ids), (TARGET,), generator=generator)].tolist()
        text = loaded.tokenizer.decode(drawn).strip()
        found.append(Problem(f"random {n}", NEUTRAL, text, SUFFIX))
    known = load_behaviours(label="harmful", splits=["test"])
    for b in known[:: max(1, len(known) // max(1, behaviours))][:behaviours]:
        found.append(Problem(b.behaviour_id, b.request, b.target_string or "", 20))
    return found


def slot_of(loaded: LoadedModel, problem: Problem) -> SuffixSlot:
    suffix = " ".join(["x"] * problem.suffix)
    return make_slot(Renderer(loaded), problem.request, problem.target, suffix=suffix)


class Timeline:
    """Seconds, operations and best loss after every step; stops the search when its time is up."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun = seconds, time.perf_counter()
        self.rows: Row = {"times": [], "operations": [], "losses": []}

    def note(self, operations: float, loss: float, at: float | None = None) -> None:
        now = time.perf_counter() - self.begun if at is None else at
        best = min([loss, *self.rows["losses"][-1:]])
        for name, value in (("times", now), ("operations", operations), ("losses", best)):
            self.rows[name].append(value)
        if now > self.seconds:
            raise TimeIsUp


def search(
    loaded: LoadedModel,
    rough: RoughModel | None,
    problem: Problem,
    method: str,
    seed: int,
    seconds: float,
) -> Row:
    """One search of ours."""
    slot, options = slot_of(loaded, problem), METHODS[method]
    allowed = allowed_tokens(loaded.tokenizer, loaded.embedding_table.shape[0])
    clock = Timeline(seconds)
    if method == "adc":
        adc = ADCConfig(num_steps=FOREVER, stop_on_match=False, **options)
        objective = TargetLoss(loaded, slot)

        def read(step: int, best: ADCResult) -> None:
            clock.note(best.operations, best.loss)

        with contextlib.suppress(TimeIsUp):
            run_adc(objective, slot, adc, allowed, seed=seed, on_step=read)
        return clock.rows
    config = GCGConfig(num_steps=FOREVER, **options)
    copy = None if config.exact else rough
    objective = TargetLoss(loaded, slot, rough=copy, lsgm=config.lsgm)

    def on_step(state: GCGState) -> None:
        clock.note(state.operations, state.best_loss)

    with contextlib.suppress(TimeIsUp):
        run_gcg(
            objective,
            slot,
            config,
            allowed,
            seed=seed,
            screened=copy is not None,
            on_step=on_step,
        )
    return clock.rows


def published(loaded: LoadedModel, problem: Problem, method: str, seed: int, seconds: float) -> Row:
    """One search of nanogcg's, which counts its own seconds; a process of its own."""
    slot = slot_of(loaded, problem)
    config = {"num_steps": FOREVER, "search_width": 512, "topk": 256, **METHODS[method]}
    per_step = operations_of(slot, config)
    clock, passed = Timeline(seconds), [0.0, 0.0]

    def on_step(step: Row) -> None:
        passed[0] += step["seconds"]["step"]
        passed[1] += per_step
        clock.note(passed[1], step["loss"], at=passed[0])

    with contextlib.suppress(TimeIsUp), reference(loaded) as engine:
        engine.run(slot, config, on_step=on_step, torch_seed=seed)
    return clock.rows


# --- report ---------------------------------------------------------------------------------------
def at(row: Row, axis: str, limit: float) -> float:
    """Best loss once ``axis`` (times or operations) has reached at most ``limit``."""
    inside = [x for t, x in zip(row[axis], row["losses"], strict=True) if t <= limit]
    return inside[-1] if inside else math.nan


def reached(row: Row, goal: float) -> float | None:
    """Seconds until the best loss is at most ``goal``."""
    pairs = zip(row["times"], row["losses"], strict=True)
    return next((t for t, loss in pairs if loss <= goal), None)


def interval(groups: list[list[float]], of: Callable[[Any], float], draws: int = 2000) -> Row:
    """Statistic of all values, with the interval from resampling groups and the values in them."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(draws):
        picked = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        drawn.append(of(np.concatenate([rng.choice(g, len(g)) for g in picked])))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": of(np.concatenate(groups)), "low": float(low), "high": float(high)}


def geometric(values: Any) -> float:
    return float(np.exp(np.log(values).mean()))


def mean(values: Any) -> float:
    return float(np.mean(values))


def report(rows: list[Row], seconds: float) -> str:
    """Time to nanogcg's loss, and losses at equal time and equal work."""
    by = {(r["method"], r["task"], r["seed"]): r for r in rows}
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    seeds = sorted({r["seed"] for r in rows})
    least = min(
        (max(r["operations"]) for r in rows if r["operations"][-1] == r["operations"][-1]),
        default=math.nan,
    )
    header = ("method", "runs", "steps", "s to nanogcg's loss", "95 %", "not reached")
    lines = [(*header, f"loss at {seconds:.0f} s", "95 %", f"loss at {least:.1e}", "95 %")]
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [[(by[k], k) for s in seeds if (k := (method, t, s)) in by] for t in tasks]
        own = [group for group in own if group]
        flat = [row for group in own for row, _ in group]
        waits, late = [], 0
        for group in own:
            found = []
            for row, (_, task, seed) in group:
                base = by.get((NANO, task, seed))
                if base is not None:
                    wait = reached(row, base["losses"][-1])
                    late += wait is None
                    whole = max(row["times"][-1], base["times"][-1])
                    found.append(whole if wait is None else wait)
            if found:
                waits.append(found)
        cells = [method, str(len(flat)), f"{mean([len(r['times']) for r in flat]):.0f}"]
        cells += [*shown(waits, geometric, ".1f"), str(late)] if waits else ["-", "", ""]
        for axis, limit in (("times", seconds), ("operations", least)):
            losses = [[at(row, axis, limit) for row, _ in group] for group in own]
            everywhere = not any(math.isnan(loss) for group in losses for loss in group)
            cells += shown(losses, mean, ".3f") if everywhere else ["-", ""]  # no step yet
        lines.append(tuple(cells))
    return aligned(lines)


def shown(groups: list[list[float]], of: Callable[[Any], float], form: str) -> list[str]:
    found = interval(groups, of)
    return [f"{found['value']:{form}}", f"[{found['low']:{form}}, {found['high']:{form}}]"]


def draw(rows: list[Row], path: Path) -> None:
    """Best loss over time: the mean of each method over tasks and seeds, with quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from plots.style import COLOURS

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    kinds = ("random targets", "behaviours")
    for axis, kind in zip(figure.subplots(1, 2, squeeze=False)[0], kinds, strict=True):
        own = [r for r in rows if r["task"].startswith("random") == (kind == kinds[0])]
        for n, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
            runs = [r for r in own if r["method"] == method]
            if not runs:
                continue
            grid = np.geomspace(1, max(r["times"][-1] for r in runs), 60)
            table = np.array([[at(r, "times", t) for t in grid] for r in runs])
            seen = ~np.isnan(table).any(0)
            colour, line = COLOURS[n % len(COLOURS)], "-" if n < len(COLOURS) else "--"
            axis.plot(grid[seen], table.mean(0)[seen], line, color=colour, label=method)
            ends = np.quantile(table[:, seen], (0.25, 0.75), axis=0)
            axis.fill_between(grid[seen], *ends, color=colour, alpha=0.1, linewidth=0)
        axis.set(title=kind, xscale="log", xlabel="seconds", ylabel="best loss, nats per token")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)


@click.command()
@click.option("--model", default="embedded")
@click.option("--random", type=click.IntRange(0), default=2, help="Random targets.")
@click.option("--behaviours", "count", type=click.IntRange(0), default=2)
@click.option("--seeds", type=click.IntRange(1), default=5)
@click.option("--seconds", type=float, default=120.0, help="Of each search.")
@click.option(
    "--ours", "seconds_of_ours", type=float, help="Of each search of ours [default: --seconds]."
)
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True)
@click.option("--report", "only_report", is_flag=True, help="Print tables of what is there.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the curves here.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Rows; goes on.")
def main(
    model: str,
    random: int,
    count: int,
    seeds: int,
    seconds: float,
    seconds_of_ours: float | None,
    methods: tuple[str, ...],
    only_report: bool,
    picture: Path | None,
    out: Path,
) -> None:
    """Best loss over time and operations."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    rows = [row for row in rows if row["model"] == model]
    if not only_report:
        loaded = load(model)
        rough = rough_copy(loaded)
        tasks = problems(loaded, random, count)
        if rough is not None:
            slot = slot_of(loaded, tasks[0])
            trial = TargetLoss(loaded, slot, rough=rough)
            rough = rough if gains(trial, torch.tensor(slot.initial_ids)) else None
        done = {(r["method"], r["task"], r["seed"]) for r in rows}
        about = {"model": model, "device": device_name(loaded.device)}
        for seed, (number, problem) in product(range(seeds), enumerate(tasks)):
            chosen = list(methods or METHODS)
            turn = (seed + number) % len(chosen)
            for method in chosen[turn:] + chosen[:turn]:
                if (method, problem.name, seed) in done:
                    continue
                nano = method.startswith(NANO)
                allowed = seconds if nano or seconds_of_ours is None else seconds_of_ours
                run = (problem, method, seed, allowed)
                found = published(loaded, *run) if nano else search(loaded, rough, *run)
                cell = {"method": method, "task": problem.name, "seed": seed}
                cell |= {"seconds": allowed, "screened": rough is not None}
                rows.append(about | cell | found)
                with open(out, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                told = f"{len(found['times'])} steps, loss {found['losses'][-1]:.3f}"
                click.echo(f"{method}, {problem.name}, seed {seed}: {told}", err=True)
    if rows:
        click.echo(report(rows, min(r["times"][-1] for r in rows)))
        if picture:
            draw(rows, picture)


if __name__ == "__main__":
    main()
