"""Harmfulness and refusal directions by difference of means, with intervals and nulls.

    harmfulness        n( mean(t_inst | harmful)      - mean(t_inst | harmless) )
    refusal, ``harc``  n( mean(t_post_inst | harmful) - mean(t_post_inst | harmless) )
    refusal, ``zhao``  n( mean(t_post_inst | refused) - mean(t_post_inst | accepted) )

Sources: Zhao 2507.11878 and HARC 2607.00572. ``harc`` takes the same sets for both directions.
``zhao`` goes by the model's own replies; its harmfulness uses harmful prompts that were refused and
harmless ones that were accepted. Each is a contrast (``contrasts.py``): directions point towards
harmful and towards refused. On sets that are not filtered by the model's own behaviour the two
concepts are confounded, so cos(harc, zhao) is reported where both exist.

Statistics per layer (``Directions.statistics``), all from the activations at hand:

    cos_harmfulness_refusal        cosine of the two directions; ``_interval``: basic bootstrap
    stability_*                    percentiles of the cosine of a resampled direction with the
                                   direction itself
    separation_*                   held-out d' along the direction (two folds, averaged)
    null_random_*                  95th percentile over random unit directions
    null_permuted_*                95th percentile over permuted labels, everything re-estimated
    null_permuted_directions_*     99 of those directions, (draw, layer, d_model), for the plane
    cos_harc_zhao                  cosine of the two refusal estimators, where the model refuses
                                   and accepts enough
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from core.readings import Activations, Directions
from geometry.contrasts import (
    SMALLEST_CLASS,
    Contrast,
    cosine,
    d_prime,
    held_out_separation,
    indices,
    unit,
)
from geometry.layers import inner_layers
from geometry.resampling import Sampled, percentiles, random_cosine, sample, sampled_cosine, upper

ESTIMATORS = ("harc", "zhao")
KEPT_NULLS = 99


@dataclass(frozen=True)
class EstimateConfig:
    """``resamples``: bootstrap samples, permutations and random directions each (HARC: 200)."""

    resamples: int = 200
    seed: int = 0


Sides = tuple[Tensor, Tensor]
"""Prompt indices on the positive and on the negative side of a contrast."""


@dataclass(frozen=True)
class Classes:
    """Index vectors of the two classes that each direction contrasts."""

    harmfulness: Sides
    refusal: Sides


def refused_and_accepted(refused: Sequence[bool | None]) -> Sides:
    """Indices of refused and of accepted prompts; those not judged are in neither."""
    return indices(r is True for r in refused), indices(r is False for r in refused)


def classes(
    estimator: str, harmful: Sequence[bool], refused: Sequence[bool | None] | None
) -> Classes:
    """Which prompts stand on which side, by estimator.

    Raises:
        AttackPlaneError: unknown estimator, ``zhao`` without replies, or fewer than four prompts on
        a side.
    """
    if estimator == "harc":
        sides = indices(harmful), indices(not h for h in harmful)
        parts = Classes(sides, sides)
    elif estimator == "zhao":
        if refused is None:
            raise AttackPlaneError("the zhao estimator needs the model's own replies")
        pairs = list(zip(harmful, refused, strict=True))
        agreeing = (
            indices(h and r is True for h, r in pairs),
            indices(not h and r is False for h, r in pairs),
        )
        parts = Classes(agreeing, refused_and_accepted(refused))
    else:
        raise AttackPlaneError(
            "unknown estimator", got=estimator, remedy=f"one of {', '.join(ESTIMATORS)}"
        )
    for name, (positive, negative) in vars(parts).items():
        if min(len(positive), len(negative)) < SMALLEST_CLASS:
            raise AttackPlaneError(
                f"too few prompts for the {name} direction ({estimator})",
                got=f"{len(positive)} on the harmful or refused side, {len(negative)} on the other",
                remedy=(
                    f"at least {SMALLEST_CLASS} on each side; a model that never (or always) "
                    "refuses has no "
                    "zhao direction: use harc"
                ),
            )
    return parts


def estimate(
    activations: Activations,
    harmful: Sequence[bool],
    *,
    estimator: str = "harc",
    refused: Sequence[bool | None] | None = None,
    units: Sequence[str] | None = None,
    config: EstimateConfig = EstimateConfig(),
) -> Directions:
    """Estimate both directions at every layer, with the statistics of the module's text.

    Args:
        activations: residuals of the contrast prompts.
        harmful: their labels.
        refused: whether the model's own reply refused each (None: not judged). ``zhao`` needs it;
            where it is given, ``harc`` reports cos(harc, zhao) too.
        units: the pair that each prompt belongs to; without it each prompt is its own.
    """
    sides = classes(estimator, harmful, refused)
    at_inst, at_post = activations.at("t_inst"), activations.at("t_post_inst")
    names = tuple(units or activations.prompt_ids)
    contrasts = [
        Contrast("harmfulness", at_inst, *sides.harmfulness, names),
        Contrast("refusal", at_post, *sides.refusal, names),
    ]
    if estimator == "harc" and refused is not None:
        crossed = refused_and_accepted(refused)
        if min(map(len, crossed)) >= SMALLEST_CLASS:  # else there is no zhao direction
            contrasts.append(Contrast("zhao", at_post, *crossed, names))
    generator = torch.Generator().manual_seed(config.seed)
    sampled = sample(contrasts, config.resamples, generator)
    h, r = contrasts[:2]
    harmless = sides.harmfulness[1]
    return Directions(
        model=activations.model,
        estimator=estimator,
        harmfulness=h.direction,
        refusal=r.direction,
        harmfulness_norm=h.difference.norm(dim=-1).float() * h.alive,
        refusal_norm=r.difference.norm(dim=-1).float() * r.alive,
        harmless_t_inst=at_inst[harmless].double().mean(0).float(),
        harmless_t_post_inst=at_post[harmless].double().mean(0).float(),
        sample_counts={
            f"{c.name}_{side}": len(getattr(c, side))
            for c in (h, r)
            for side in ("positive", "negative")
        },
        statistics=_statistics(sampled, config, generator),
        settings={"resamples": config.resamples, "seed": config.seed},
    )


def _statistics(
    sampled: Sequence[Sampled], config: EstimateConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """The statistics of the module's text; ``sampled``: harmfulness, refusal and maybe zhao."""
    h, r = sampled[:2]
    statistics = {**_of_one(h, generator), **_of_one(r, generator)}
    together = sampled_cosine(h, r)
    layers, d_model = h.contrast.resid.shape[1:]
    random = random_cosine(d_model, config.resamples, generator)
    separations = statistics["separation_harmfulness"], statistics["separation_refusal"]
    statistics |= {
        "cos_harmfulness_refusal": together["value"],
        "cos_harmfulness_refusal_interval": together["interval"],
        "null_permuted_cos": together["null_permuted"],
        "null_random_cos": torch.full((layers,), random),
        "layer_score": layer_score(together["value"], *separations),
    }
    for z in sampled[2:]:
        crossed = sampled_cosine(r, z)
        statistics["cos_harc_zhao"] = crossed["value"]
        statistics["cos_harc_zhao_interval"] = crossed["interval"]
        statistics["null_permuted_cos_harc_zhao"] = crossed["null_permuted"]
    return statistics


def _of_one(sampled: Sampled, generator: torch.Generator) -> dict[str, Tensor]:
    """Stability, separation and nulls of one direction."""
    c = sampled.contrast
    null = sampled.permuted_difference
    random = unit(torch.randn(len(null), c.resid.shape[2], generator=generator))
    scores = torch.einsum("nld,kd->nkl", c.resid, random)
    return {
        f"stability_{c.name}": percentiles(cosine(sampled.resampled, c.direction)),
        f"separation_{c.name}": c.separation() * c.alive,
        f"null_permuted_norm_{c.name}": null.norm(dim=-1).quantile(0.95, dim=0),
        f"null_permuted_separation_{c.name}": upper(held_out_separation(c.resid, *sampled.sides)),
        f"null_random_separation_{c.name}": upper(d_prime(scores[c.positive], scores[c.negative])),
        f"null_permuted_directions_{c.name}": unit(null[:KEPT_NULLS]),
    }


def layer_score(cosines: Tensor, separation_h: Tensor, separation_r: Tensor) -> Tensor:
    """(layer,) score (1 - |cos(harmfulness, refusal)|) * mean held-out d' of the two directions.

    HARC's Eq. 6 without response-side directions: its first factor times the class separation.
    Layers that are not ``inner_layers`` score NaN.
    """
    score = (1 - cosines.abs()) * (separation_h + separation_r) / 2
    inner = inner_layers(len(cosines) - 1)
    score[: inner.start] = torch.nan
    score[inner.stop :] = torch.nan
    return score


def best_layers(directions: Directions, top: int = 1) -> list[int]:
    """Layers with the highest layer score, best first."""
    score = directions.statistics["layer_score"].nan_to_num(-torch.inf)
    return score.topk(min(top, len(score))).indices.tolist()
