"""One GCG step against nanogcg 0.3.0, in one run: time by parts, operations, memory. Usage:

    python -m benchmarks.gcg_speed --width 64 --width 256 --width 512    (embedded model)
    python -m benchmarks.gcg_speed --behaviours 4 --pairs 25             (other suffixes, requests)
    python -m benchmarks.gcg_speed --random llama-8b --dtype bfloat16 --width 512   (random weights,
                                                                                    no download)
    python -m benchmarks.gcg_speed --no-reference --path cached           (ours alone, by another
                                                                          path)
    python -m benchmarks.gcg_speed --exact                                (all candidates in
                                                                          float32)

nanogcg runs its own optimiser in its own environment and waits before every step. After each of its
steps ours runs one on the same suffix and the same candidates, so both see the same machine; losses
must agree to 1e-4 (float32): the winner's in every step, all candidates' in every tenth. Where
rough scores are faster here, ours finds its winner by them first, as `gcg` does: the report says
how often it is nanogcg's winner, and how much higher its loss is where it is not. A width's ratio
is seconds of a step of nanogcg over ours, the median over the pairs. The last line is `ratio R`:
that over the width's goal (3 at 64, 4 at 256, 4.5 at 512), the smallest of the widths; 1 or more
says that all are reached.

GFLOP counts necessary operations: per fed token two per block weight and four per attention channel
and visible token; the head over the likely tokens for every candidate, over the whole vocabulary
for those that need it. A fed token is one that does not lie in what a candidate shares with the
current suffix. The peak is a large matrix product of the same minutes.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import click
import torch

from attacks.candidates import allowed_tokens, sample_candidates
from attacks.nanogcg_engine import reference
from attacks.objective import PATHS, TargetLoss
from attacks.rough import RoughModel
from attacks.screening import Screening, gains, rough_copy
from attacks.slot import SuffixSlot, default_slot
from benchmarks.measure import (
    RANDOM,
    device_name,
    matrix_peak,
    median,
    random_model,
    timed,
)
from core.memory import forget_peak, peak_mib
from core.models import LoadedModel, load
from core.prompt import Renderer
from core.rows import Row
from core.text import aligned
from core.weights import DTYPES
from evaluation.behaviours import load_behaviours

GOALS = {64: 3.0, 256: 4.0, 512: 4.5}
"""Ratios that are wanted, by width."""
PARTS = ("gradient", "sampling", "fidelity", "scoring", "step")
ON_A_GPU = (
    "python -m benchmarks.gcg_speed --model 'embedded?dtype=bfloat16' --width 512",
    "python -m benchmarks.gcg_speed --random llama-8b --dtype bfloat16 --width 512",
)
AGREEMENT = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def scoring_gflop(
    objective: TargetLoss, suffix: torch.Tensor, candidates: torch.Tensor, likely: int
) -> float:
    """Necessary operations of the last ``best`` on these candidates."""
    loaded, config = objective.loaded, objective.loaded.config
    weights = sum(p.numel() for block in loaded.blocks for p in block.parameters() if p.dim() == 2)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    channels = config.num_hidden_layers * config.num_attention_heads * head_dim
    length, before, targets = len(suffix), len(objective.before), len(objective.target)
    shared = (candidates == suffix).long().cumprod(1).sum(1).clamp(max=length - 1)
    if objective.path != "packed":
        shared = torch.zeros_like(shared)
    end = before + length + len(objective.after) + targets - 1
    starts = (before + shared).double()
    fed = float((end - starts).sum())
    visible = float(((starts + 1 + end) * (end - starts) / 2).sum())
    vocabulary = loaded.embedding_table.shape[0]
    head = (
        2
        * config.hidden_size
        * targets
        * (objective.fully_scored * vocabulary + len(candidates) * likely)
    )
    return (2 * weights * fed + 4 * channels * visible + head) / 1e9


class Ours:
    """Our step, on suffixes and candidates that come from outside."""

    def __init__(
        self,
        loaded: LoadedModel,
        slot: SuffixSlot,
        width: int,
        topk: int,
        *,
        path: str | None,
        rough: RoughModel | None,
    ) -> None:
        self.loaded, self.slot, self.width, self.topk = loaded, slot, width, topk
        self.objective = TargetLoss(loaded, slot, path=path, rough=rough)
        pays = rough is not None and gains(self.objective, torch.tensor(slot.initial_ids))
        self.screening = Screening() if pays else None
        self.allowed = allowed_tokens(loaded.tokenizer, loaded.embedding_table.shape[0])
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, suffix: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return sample_candidates(
            suffix,
            gradient,
            self.allowed,
            topk=self.topk,
            width=self.width,
            n_replace=1,
            generator=self.generator,
        )

    def best(self, candidates: torch.Tensor) -> tuple[int, float]:
        """Index and loss of the winner."""
        if self.screening is None:
            return self.objective.best(candidates)
        return self.screening.lowest(self.objective, candidates)[0]

    def step(self, suffix: torch.Tensor, candidates: torch.Tensor | None) -> Row:
        """One step by parts; scores ``candidates``, or its own where there are none."""
        device, objective = self.loaded.device, self.objective
        peak = matrix_peak(device, self.loaded.dtype)
        types = (torch.bfloat16, torch.int8) if self.screening else ()
        rough_peaks = [matrix_peak(device, dtype) for dtype in types]
        forget_peak(device)
        before = self.screening.exactly if self.screening else 0
        start = time.perf_counter()
        gradient_s, (_, gradient) = timed(lambda: objective.token_gradient(suffix), device)
        sampling_s, drawn = timed(lambda: self.draw(suffix, gradient), device)
        fidelity_s, kept = timed(lambda: self.slot.faithful(drawn.tolist()), device)
        scored = drawn[torch.tensor(kept)] if candidates is None else candidates
        scoring_s, (winner, loss) = timed(lambda: self.best(scored), device)
        step_s, memory = time.perf_counter() - start, peak_mib(device)
        likely = objective.scorer.likely_tokens if objective.loaded.dtype == torch.float32 else 0
        gflop = scoring_gflop(objective, suffix, scored, likely)
        seconds = {
            "gradient": gradient_s,
            "sampling": sampling_s,
            "fidelity": fidelity_s,
            "scoring": scoring_s,
        }
        return {
            "seconds": seconds | {"step": step_s},
            "peak_mib": memory,
            "peak_gflops": peak,
            "rough_peaks_gflops": rough_peaks,
            "gflop": gflop,
            "scored": len(scored),
            "screened": self.screening is not None,
            "fully_scored": objective.fully_scored,
            "exactly": self.screening.exactly - before if self.screening else None,
            "winner": winner,
            "loss": loss,
            "candidates": scored,
        }


def compare(
    ours: Ours, theirs: Row, row: Row, candidates: torch.Tensor, every: bool = True
) -> float:
    """Largest difference of the winner's loss, or of every candidate's; more than rounding is
    refused."""
    expected = torch.tensor(theirs["losses"])
    limit = AGREEMENT[ours.loaded.dtype]
    row["behind"] = float(expected[row["winner"]] - expected.min())
    row["same_winner"] = row["behind"] <= 1e-5  # ties but for rounding
    worst = abs(row["loss"] - float(expected[row["winner"]]))
    if every:
        worst = max(worst, float((ours.objective.losses(candidates) - expected).abs().max()))
    if worst > limit:
        raise click.ClickException(
            f"losses differ by {worst:.2g} (limit {limit}); best {row['loss']:.6f}, nanogcg "
            f"{float(expected.min()):.6f}"
        )
    return worst


def pairs_with_reference(ours: Ours, steps: int, batch_size: int | None) -> list[Row]:
    """Steps of nanogcg, each followed by one of ours on the same suffix and candidates; the first
    pair warms up."""
    rows: list[Row] = []

    def follow(theirs: Row) -> None:
        suffix, candidates = torch.tensor(theirs["suffix"]), torch.tensor(theirs["candidates"])
        row = ours.step(suffix, candidates)
        row["difference"] = compare(ours, theirs, row, candidates, every=len(rows) % 10 == 1)
        row["nanogcg"] = {key: theirs[key] for key in ("seconds", "peak_mib")}
        rows.append(row)
        click.echo(
            f"  pair {len(rows) - 1}: nanogcg {theirs['seconds']['step']:.2f} s, ours "
            f"{row['seconds']['step']:.2f} s",
            err=True,
        )

    with reference(ours.loaded) as engine:
        config = {
            "num_steps": steps + 1,
            "search_width": ours.width,
            "topk": ours.topk,
            "batch_size": batch_size,
        }
        if (
            ours.loaded.fingerprint == "random"
        ):  # most of its ids have no token that would survive a filter
            config["filter_ids"] = False
        engine.run(ours.slot, config, on_step=follow, before_step=lambda: None, torch_seed=1)
    return rows[1:]


def alone(ours: Ours, steps: int) -> list[Row]:
    suffix, rows = torch.tensor(ours.slot.initial_ids), []
    for _ in range(steps + 1):
        row = ours.step(suffix, None)
        suffix = row["candidates"][row["winner"]]
        rows.append(row)
    return rows[1:]


def table(rows: list[Row]) -> str:
    """Medians by part, and what the scoring reached."""
    lines: list[tuple[str, ...]] = [("seconds", "nanogcg", "ours", "ratio")]
    for part in PARTS:
        mine = median([r["seconds"][part] for r in rows])
        if "nanogcg" not in rows[0]:
            lines.append((part, "-", f"{mine:.3f}", "-"))
            continue
        theirs = median([r["nanogcg"]["seconds"][part] for r in rows])
        lines.append((part, f"{theirs:.3f}", f"{mine:.3f}", f"{theirs / mine:.2f}"))
    rates = [r["gflop"] / r["seconds"]["scoring"] for r in rows]
    text = aligned(lines)
    if "nanogcg" in rows[0]:
        ratios = sorted(ratios_of(rows))
        text += f"\nratio of the pairs: {ratios[0]:.2f} to {ratios[-1]:.2f}, median "
        text += f"{median(ratios):.2f}"
        text += f"\nsame winner in {sum(r['same_winner'] for r in rows)} of {len(rows)} steps"
        text += (
            f"; where it is another, its loss is up to {max(r['behind'] for r in rows):.2g} higher"
        )
        text += (
            f"\nlargest difference of a loss: {max(r['difference'] for r in rows):.2g} nats per "
            "token"
        )
        memory = [
            max(r["nanogcg"]["peak_mib"] or 0 for r in rows),
            max(r["peak_mib"] or 0 for r in rows),
        ]
        text += f"\npeak memory: nanogcg {memory[0]:.0f} MiB, ours {memory[1]:.0f} MiB"
    else:
        text += f"\npeak memory: {max(r['peak_mib'] or 0 for r in rows):.0f} MiB"
    text += f"\nlarge products: {median([r['peak_gflops'] for r in rows]):.0f} GFLOP/s"
    if rows[0]["screened"]:
        rough = zip(*(r["rough_peaks_gflops"] for r in rows), strict=True)
        peaks = [median(list(each)) for each in rough]
        text += ", in bfloat16 {:.0f}, in 8-bit integers {:.0f}".format(*peaks)
        exactly = median([r["exactly"] for r in rows])
        return f"{text}\nscored exactly: {exactly:.0f} of {rows[0]['scored']} a step"
    share = median([rate / r["peak_gflops"] for rate, r in zip(rates, rows, strict=True)])
    return (
        f"{text}\nscoring: {median([r['gflop'] / r['scored'] for r in rows]):.2f} GFLOP a "
        "candidate, "
        f"{median(rates):.0f} GFLOP/s, {100 * share:.0f} % of the product's; whole head for "
        f"{median([r['fully_scored'] for r in rows])} of {rows[0]['scored']}"
    )


def ratios_of(rows: list[Row]) -> list[float]:
    """nanogcg's seconds over ours, of each pair."""
    return [r["nanogcg"]["seconds"]["step"] / r["seconds"]["step"] for r in rows]


def slots_of(loaded: LoadedModel, count: int) -> list[SuffixSlot]:
    """Slots of the demonstration set's first behaviours."""
    found = []
    for behaviour in load_behaviours(label="harmful", splits=["test"])[:count]:
        assert behaviour.target_string is not None
        found.append(
            default_slot(
                Renderer(loaded),
                behaviour.request,
                behaviour.target_string,
                length=20,
                placement="{request} {suffix}",
                system=None,
            )
        )
    return found


@click.command()
@click.option("--model", default="embedded")
@click.option(
    "--random",
    "random_name",
    type=click.Choice(list(RANDOM)),
    help="Random weights of a known size.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="With --random.")
@click.option("--width", "widths", type=click.IntRange(1), multiple=True, default=(64, 256))
@click.option("--topk", type=click.IntRange(1), default=256)
@click.option(
    "--pairs", type=click.IntRange(1), default=5, help="Measured steps, after one that warms up."
)
@click.option("--behaviours", "count", type=click.IntRange(1), default=1)
@click.option("--exact", is_flag=True, help="Score all candidates exactly, none roughly first.")
@click.option("--path", type=click.Choice(PATHS), help="Force a way of scoring.")
@click.option("--reference/--no-reference", "with_reference", default=True, help="Run nanogcg too.")
@click.option(
    "--reference-batch",
    type=click.IntRange(1),
    help="nanogcg's batch_size [default: its own, the width]",
)
@click.option("--dry-run", is_flag=True, help="Say what would be run.")
@click.option("--out", type=click.Path(path_type=Path), help="Append the rows here as JSON lines.")
def main(
    model: str,
    random_name: str | None,
    dtype: str,
    widths: tuple[int, ...],
    topk: int,
    pairs: int,
    count: int,
    path: str | None,
    exact: bool,
    with_reference: bool,
    reference_batch: int | None,
    dry_run: bool,
    out: Path | None,
) -> None:
    """Measure one GCG step by parts, in turn with nanogcg's."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("attacks").setLevel(logging.INFO)
    loaded = random_model(random_name, DTYPES[dtype]) if random_name else load(model)
    slots = slots_of(loaded, count)
    click.echo(f"{loaded.describe()}; {device_name(loaded.device)}")
    for slot in slots:
        sizes = map(len, (slot.before_ids, slot.initial_ids, slot.after_ids, slot.target_ids))
        click.echo("tokens: {} prefix, {} suffix, {} tail, {} target".format(*sizes))
    if dry_run:
        how = "in turn with nanogcg" if with_reference else "alone"
        click.echo(f"would run {pairs} steps at widths {widths} for each, {how}")
        return
    rough = None if exact else rough_copy(loaded)
    shares = []
    for width in widths:
        rows: list[Row] = []
        for slot in slots:
            ours = Ours(loaded, slot, width, topk, path=path, rough=rough)
            found = (
                pairs_with_reference(ours, pairs, reference_batch)
                if with_reference
                else alone(ours, pairs)
            )
            if out:
                about: Row = {"model": loaded.spec, "device": device_name(loaded.device)}
                about |= {"width": width, "topk": topk, "path": ours.objective.path}
                with open(out, "a") as file:
                    for row in found:
                        kept = {name: row[name] for name in row if name != "candidates"}
                        file.write(json.dumps(about | kept) + "\n")
            rows += found
        how = f"path {ours.objective.path}" + (", screened" if ours.screening else ", all exactly")
        click.echo(f"\nwidth {width}, top-k {topk}, {how}, {len(rows)} steps\n{table(rows)}")
        if with_reference and (goal := GOALS.get(width)):
            shares.append(median(ratios_of(rows)) / goal)
            click.echo(f"goal: {goal}")
    if not torch.cuda.is_available():
        click.echo(
            "\nno CUDA device here; on one this would be run too:\n  " + "\n  ".join(ON_A_GPU)
        )
    if shares:
        click.echo(f"\nratio {min(shares):.2f}")


if __name__ == "__main__":
    main()
