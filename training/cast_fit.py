"""How CAST is fitted. ``training/cast.py`` says what is fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from core.cards import write_card
from core.cast import HOOK, Cast, similarity
from core.errors import AttackPlaneError
from core.files import write_atomically
from core.models import LoadedModel, ModelHandle
from core.prompt import Conversation, Renderer
from core.records import HARMFUL, HARMLESS, Behaviour
from core.rows import Row
from core.store import RunFolder
from plots.condition_png import GRID, SCORES, draw
from plots.condition_png import NAME as PICTURE
from training.cast import CASTConfig
from training.data import Texts, texts_of
from training.examples import Example
from training.forward import Forward
from training.loop import STAGE, card, refuse_adapter, settings_of
from training.registry import Arm, TrainResult
from training.requests import Requests
from training.saved import refuse_foreign, table

FOLDER = "cast"
DEPTHS = (10 / 32, 15 / 32)
"""First and last layer that the behaviour is added at, as shares of the depth, rounded up: the
condition is read up to the first of them, and it reads better later (docs/lab-log.md, 2026-11-28).
"""


def first_component(positive: Tensor, negative: Tensor) -> Tensor:
    """(pair, d_model) each -> (d_model,) unit: the first principal component of the pairs.

    Every pair is centred by its own mean, so that this is the leading right singular vector of the
    differences. It points towards the positive side.
    """
    differences = (positive - negative).double()
    v = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return (v * (differences.mean(0) @ v).sign()).float()


def best_threshold(scores: Tensor, harmful: Tensor) -> tuple[float, bool, float]:
    """The threshold with the highest F1 of harmful: (threshold, harmful is above it, F1).

    ``scores`` (prompt,), ``harmful`` (prompt,) bool. Tried are all midpoints between neighbouring
    scores; of equal ones the one in the widest gap is taken.
    """
    ordered = scores.double().sort().values
    gaps = ordered.diff()
    middles = (ordered[:-1] + ordered[1:]) / 2
    best = (-1.0, -1.0, 0.0, True)
    for gap, middle in zip(gaps.tolist(), middles.tolist(), strict=True):
        for above in (True, False):
            said = scores > middle if above else scores < middle
            hits = float((said & harmful).sum())
            f1 = 2 * hits / max(1.0, float(said.sum() + harmful.sum()))
            best = max(best, (f1, gap, middle, above))
    return best[2], best[3], best[0]


def fit(arm: Arm, spec: str, requests: Requests, config: CASTConfig, out: Path) -> TrainResult:
    """Fit the hook and write it to ``out/cast``.

    Raises:
        AttackPlaneError: fewer than two harmful and two harmless requests on either split.
    """
    refuse_adapter(spec)
    folder = RunFolder(out)
    with folder:
        refuse_foreign(out, GRID, SCORES, FOLDER, PICTURE)
        handle = ModelHandle(spec)
        settings = settings_of(arm, config, requests)
        folder.begin_stage(STAGE, settings, {spec: handle.fingerprint})
        base = handle.loaded
        texts = texts_of(base, requests, folder, config)
        cast, told, grid, scores = estimated(base, texts, requests, config)
        path = out / FOLDER
        write_atomically(out / GRID, table(grid))
        write_atomically(out / SCORES, table(scores))
        cast.save(path)
        write_card(path, card(arm, base, config, requests, 1))
    files = [out / GRID, out / SCORES, draw(out)]
    return TrainResult([path], [told], [], files, f"{path} is a hook. {HOOK}.")


def estimated(
    base: LoadedModel, texts: Texts, requests: Requests, config: CASTConfig
) -> tuple[Cast, dict[str, float], list[Row], list[Row]]:
    """The hook, what was chosen, the best threshold of every layer, and the validation scores."""
    n = base.n_layers
    first, last = (math.ceil(depth * n) for depth in DEPTHS)
    layers, candidates = list(range(first, last + 1)), list(range(1, first + 1))
    fitted, chosen_on = split(requests)
    forward = Forward(base)
    train, validation = (
        prompt_means(forward, texts, rows, candidates) for rows in (fitted, chosen_on)
    )
    harmful = torch.tensor([b.label == HARMFUL for b in chosen_on])
    grid = []
    for k, layer in enumerate(candidates):
        pairs = matched(fitted)
        c = first_component(*(train[[pair[side] for pair in pairs], k] for side in (0, 1)))
        scores = similarity(validation[:, k], c)
        grid.append((*best_threshold(scores, harmful), layer, c, scores))
    threshold, above, f1, layer, condition, scores = max(grid, key=lambda row: row[2])
    refusals, continuations = (reply_means(forward, rows, layers) for rows in texts.pairs())
    behaviour = []
    for k in range(len(layers)):
        v = first_component(refusals[:, k], continuations[:, k])
        distance = float(((refusals[:, k] - continuations[:, k]) @ v).mean())
        behaviour.append(config.strength / len(layers) * distance * v)
    cast = Cast(
        condition=condition,
        condition_layer=layer,
        threshold=threshold,
        above=above,
        behaviour=torch.stack(behaviour),
        layers=tuple(layers),
        prompt_end=prompt_end(texts.renderer, [b.request for b in fitted]),
    )
    told = {"step": 1.0, "layer": float(layer), "threshold": threshold, "f1": f1}
    by_layer = [{"layer": g[3], "threshold": g[0], "above": int(g[1]), "f1": g[2]} for g in grid]
    pairs_of = zip(harmful.tolist(), scores.tolist(), strict=True)
    return cast, told, by_layer, [{"harmful": int(h), "similarity": s} for h, s in pairs_of]


def split(requests: Requests) -> tuple[list[Behaviour], list[Behaviour]]:
    """What vectors are estimated on, and what the threshold is chosen on."""
    known, validation = [*requests.harmful, *requests.harmless], list(requests.validation)
    if not validation:  # every fourth of a set without that split
        validation = [*requests.harmful[3::4], *requests.harmless[3::4]]
        known = [b for b in known if b not in validation]
    for rows, what in ((known, "train"), (validation, "validation")):
        counts = [sum(b.label == label for b in rows) for label in (HARMFUL, HARMLESS)]
        if min(counts) < 2:
            raise AttackPlaneError(
                f"too few requests to {'estimate' if what == 'train' else 'choose a threshold'}",
                where=f"train cast, {what}",
                got=f"{counts[0]} harmful, {counts[1]} harmless",
                remedy="at least two of each",
            )
    return known, validation


def matched(rows: Sequence[Behaviour]) -> list[tuple[int, int]]:
    """(harmful, harmless) indices: by pair where there are pairs, else in their order."""
    sides: list[Row] = [{}, {}]
    for i, b in enumerate(rows):
        side = sides[b.label != HARMFUL]
        side[b.pair_id or f"row {len(side)}"] = i
    both = [key for key in sides[0] if key in sides[1]]
    if not both:
        raise AttackPlaneError(
            "no harmful request has a harmless one to be matched with",
            where="train cast",
            got=f"{len(sides[0])} harmful, {len(sides[1])} harmless",
            remedy="give both the same pair_id, or neither any",
        )
    return [(sides[0][key], sides[1][key]) for key in both]


def prompt_means(
    forward: Forward, texts: Texts, rows: Sequence[Behaviour], layers: Sequence[int]
) -> Tensor:
    """(prompt, layer, d_model): means over all tokens of the prompts."""
    examples = [texts.example(b.request, "I") for b in rows]
    return forward.means(examples, layers, [[range(e.reply_start) for e in examples]])[0]


def reply_means(forward: Forward, examples: Sequence[Example], layers: Sequence[int]) -> Tensor:
    """(reply, layer, d_model): means over all tokens of the replies."""
    return forward.means(examples, layers, [[e.reply for e in examples]])[0]


def prompt_end(renderer: Renderer, requests: Sequence[str]) -> tuple[int, ...]:
    """The token ids that stand before every reply."""
    tails = []
    for request in requests:
        prompt = renderer.render(Conversation.build(request))
        tails.append(prompt.ids[prompt.tail.start :][::-1])
    same = 0
    while all(len(t) > same for t in tails) and len({t[same] for t in tails}) == 1:
        same += 1
    return tails[0][:same][::-1]
