"""How reliable are H and R, by the number of pairs that they are estimated from?

    python -m benchmarks.contrast_size --model embedded [--model ...] [--set demonstration ...]

n pairs are drawn from all splits of a set and split into two halves of whole pairs. Each half gives
a direction: the mean over its pairs of (harmful - harmless), at t_inst for H and at t_post_inst for
R (``harc``). The split-half reliability is the cosine of the two, averaged over draws. Its null
swaps the two labels of each pair by the toss of a coin before the halves are taken.

The layer is the best of each model by (1 - |cos(H, R)|) times the mean held-out d', from all pairs.
"""

from __future__ import annotations

import argparse
import re

import torch

from core.models import load
from core.prompt import Renderer
from core.specs import short_spec
from core.text import aligned
from evaluation.behaviours import load_behaviours
from geometry.activations import collect
from geometry.contrasts import cosine, unit
from geometry.directions import EstimateConfig, best_layers, estimate
from geometry.resampling import spearman_brown, upper
from pipeline.contrast_reading import rendered

SIZES = (16, 32, 64, 96, 128, 160, 200)
DRAWS = 200


def pair_of(behaviour_id: str, pair_id: str | None) -> str:
    """Version 1 of the set has no pair ids; the two of a pair differ in one word of their id."""
    return pair_id or re.sub("-harm(ful|less)-", "-", behaviour_id)


def halves(
    differences: torch.Tensor, n: int, generator: torch.Generator, *, swapped: bool
) -> torch.Tensor:
    """(draw,) cosines of the directions of two halves of ``n`` of the pairs (pair, d_model)."""
    cosines = []
    for _ in range(DRAWS):
        chosen = differences[torch.randperm(len(differences), generator=generator)[:n]]
        if swapped:
            signs = torch.randint(2, (n, 1), generator=generator) * 2 - 1
            chosen = chosen * signs
        first, second = chosen[: n // 2].mean(0), chosen[n // 2 :].mean(0)
        cosines.append(cosine(unit(first), unit(second)))
    return torch.stack(cosines)


def rows_of(spec: str, source: str) -> list[list[str]]:
    loaded = load(spec)
    behaviours = [b for b in load_behaviours(source) if b.label != "pseudo_harmful"]
    prompts = rendered(Renderer(loaded), behaviours, None)
    read = collect(loaded, prompts, [b.behaviour_id for b in behaviours])
    harmful = [b.label == "harmful" for b in behaviours]
    layer = best_layers(estimate(read, harmful, config=EstimateConfig(resamples=40)))[0]
    places: dict[str, dict[bool, int]] = {}
    for index, b in enumerate(behaviours):
        pair = pair_of(b.behaviour_id, b.pair_id)
        places.setdefault(pair, {})[b.label == "harmful"] = index
    bad, good = (torch.tensor([p[side] for p in places.values()]) for side in (True, False))
    table = []
    for name, position in (("H", "t_inst"), ("R", "t_post_inst")):
        resid = read.at(position)[:, layer]
        differences = resid[bad] - resid[good]
        generator = torch.Generator().manual_seed(0)
        row = [short_spec(spec), source, f"{name}, layer {layer}"]
        for n in SIZES:
            if n > len(differences):
                row.append("-")
                continue
            found = float(halves(differences, n, generator, swapped=False).mean())
            null = float(upper(halves(differences, n, generator, swapped=True)))
            row.append(f"{found:.2f} ({null:.2f}) {spearman_brown(found):.2f}")
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--set", action="append", dest="sets")
    options = parser.parse_args()
    table = [["model", "set", "direction", *(f"{n} pairs" for n in SIZES)]]
    for spec in options.model:
        for source in options.sets or ["demonstration", "demonstration-v1"]:
            table += rows_of(spec, source)
    print(aligned(table))
    print("split-half reliability (null's 95 %) cosine with the true direction")


if __name__ == "__main__":
    main()
