"""Harmfulness and refusal directions by difference of means, with intervals and nulls.

    harmfulness        n( mean(t_inst | harmful)      - mean(t_inst | harmless) )        [Zhao 2507.11878; HARC 2607.00572]
    refusal, ``harc``  n( mean(t_post_inst | harmful) - mean(t_post_inst | harmless) )   the same sets [HARC]
    refusal, ``zhao``  n( mean(t_post_inst | refused) - mean(t_post_inst | accepted) )   by the model's own reply [Zhao];
                       its harmfulness uses harmful prompts refused and harmless ones accepted

n(.) makes a unit vector (zeros where the classes do not differ, as at layer 0 on a template token); every layer
has its own. Directions point towards harmful and towards refused. Means are
accumulated in float64. On sets that are not filtered by the model's own behaviour the two concepts are confounded, so
cos(harc, zhao) is reported where both exist.

Statistics per layer (``Directions.statistics``), all from the activations at hand:

    cos_harmfulness_refusal            cosine of the two directions; ``_interval``: bootstrap over prompts, both classes
    stability_*                        bootstrap interval of the cosine between a resampled direction and the direction
    separation_*                       held-out d' = (difference of class means) / (pooled s.d.) along a direction that
                                       was estimated on the other half (two folds, averaged)
    null_random_*                      95th percentile over random unit directions
    null_permuted_*                    95th percentile over permuted prompts, everything re-estimated
    null_permuted_directions_*         40 of those directions, (draw, layer, d_model), for nulls on the plane
    cos_harc_zhao                      cosine of the two refusal estimators, where the model refuses and accepts enough
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from core.records import Activations, Directions

ESTIMATORS = ("harc", "zhao")
SMALLEST_CLASS = 4
KEPT_NULLS = 40
DRAWS_AT_ONCE = 25


@dataclass(frozen=True)
class EstimateConfig:
    """``resamples``: bootstrap samples, permutations and random directions each (HARC uses 200)."""

    resamples: int = 200
    seed: int = 0


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length one along the last dimension."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def mean_difference(resid: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """(prompt, layer, d_model) and two index vectors -> mean(positive) - mean(negative), (layer, d_model) float64."""
    return resid[positive].double().mean(0) - resid[negative].double().mean(0)


def differing_layers(difference: Tensor, resid: Tensor) -> Tensor:
    """(layer,) 1 where class means (their difference: (layer, d_model)) differ beyond rounding, else 0.

    At layer 0 every prompt may have the same residual at t_post_inst (the same template token): rounding is no direction.
    """
    return (difference.norm(dim=-1) > 1e-6 * resid.double().norm(dim=-1).mean(0)).float()


def class_weights(positive: Tensor, negative: Tensor, n: int) -> Tensor:
    """(draw, n) float32 weights w with w @ resid = mean(positive) - mean(negative), for index rows of each draw."""
    draws = positive.shape[0]
    weights = torch.zeros(draws, n)
    weights.scatter_add_(1, positive, torch.full(positive.shape, 1.0 / positive.shape[1]))
    weights.scatter_add_(1, negative, torch.full(negative.shape, -1.0 / negative.shape[1]))
    return weights


def differences(weights: Tensor, resid: Tensor) -> Tensor:
    """(draw, n) weights on (n, layer, d_model) -> (draw, layer, d_model)."""
    return (weights @ resid.flatten(1)).unflatten(1, resid.shape[1:])


def d_prime(positive: Tensor, negative: Tensor) -> Tensor:
    """(n, ...) and (m, ...) projections -> (...): difference of class means over the pooled s.d., in s.d."""
    pooled = ((positive.var(0) + negative.var(0)) / 2).sqrt().clamp_min(1e-12)
    return (positive.mean(0) - negative.mean(0)) / pooled


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """(n, ...) and (m, ...) scores -> (...): the probability that a positive one is the higher; ties count half."""
    difference = positive[:, None] - negative[None]
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean((0, 1))


def held_out_separation(
    resid: Tensor,
    positive: Tensor,
    negative: Tensor,
    measure: Callable[[Tensor, Tensor], Tensor] = d_prime,
) -> Tensor:
    """Two-fold held-out ``measure`` (d', or ``auroc``) per layer: the direction from one half, the measure on the other, both
    ways, averaged.

    ``positive`` and ``negative`` are (n,) prompt indices, or (draw, n) for many labellings at once; the result is
    (layer,) or (draw, layer).
    """
    a, b = torch.atleast_2d(positive), torch.atleast_2d(negative)
    if len(a) > DRAWS_AT_ONCE:  # all pairs of all draws would not fit the memory
        parts = zip(a.split(DRAWS_AT_ONCE), b.split(DRAWS_AT_ONCE), strict=True)
        return torch.cat([held_out_separation(resid, *part, measure) for part in parts])
    total = torch.zeros(len(a), resid.shape[1])
    for fold in (0, 1):
        weights = class_weights(a[:, fold::2], b[:, fold::2], resid.shape[0])
        scores = torch.einsum("nld,kld->knl", resid, unit(differences(weights, resid)))
        draws = torch.arange(len(a))[:, None]
        sides = scores[draws, a[:, 1 - fold :: 2]], scores[draws, b[:, 1 - fold :: 2]]
        total += measure(*(side.transpose(0, 1) for side in sides)) / 2
    return total if positive.dim() == 2 else total[0]


def interval(draws: Tensor) -> Tensor:
    """(draw, layer) -> (layer, 2): the 2.5th and 97.5th percentiles."""
    ends = torch.tensor([0.025, 0.975], dtype=draws.dtype)
    return draws.quantile(ends, dim=0).T.contiguous()


Sides = tuple[Tensor, Tensor]
"""Prompt indices on the positive and on the negative side of a contrast."""


@dataclass(frozen=True)
class _Draws:
    """(draw, n) how often each prompt is drawn in a bootstrap sample, and (draw, n) permutations of the prompts.

    One set serves all directions of a model, so that what they share by sharing prompts stays shared under resampling
    and under the null. Prompts are resampled within strata: those that stand on the same sides everywhere.
    """

    counts: Tensor
    permutations: Tensor


def _draw(contrasts: Sequence[Sides], n: int, draws: int, generator: torch.Generator) -> _Draws:
    sides = torch.zeros(n, len(contrasts), dtype=torch.long)
    for column, (positive, negative) in enumerate(contrasts):
        sides[positive, column], sides[negative, column] = 1, 2
    counts = torch.zeros(draws, n)
    permutations = torch.arange(n).repeat(draws, 1)
    for stratum in sides.unique(dim=0):
        members = (sides == stratum).all(1).nonzero()[:, 0]
        drawn = members[torch.randint(len(members), (draws, len(members)), generator=generator)]
        counts.scatter_add_(1, drawn, torch.ones(drawn.shape))
    used = sides.any(1).nonzero()[:, 0]
    order = torch.rand(draws, len(used), generator=generator).argsort(1)
    permutations[:, used] = used[order]
    return _Draws(counts, permutations)


def _bootstrap_weights(counts: Tensor, sides: Sides) -> Tensor:
    """(draw, n) weights of the resampled mean difference."""
    weights = torch.zeros_like(counts)
    for side, sign in zip(sides, (1.0, -1.0), strict=True):
        weights[:, side] = sign * counts[:, side] / counts[:, side].sum(1, keepdim=True)
    return weights


@dataclass(frozen=True)
class _Estimated:
    """One direction (layer, d_model), its norm (layer,), its draws (draw, layer, d_model), its statistics."""

    direction: Tensor
    norm: Tensor
    resampled: Tensor
    permuted: Tensor
    statistics: dict[str, Tensor]


def _one_direction(
    name: str, resid: Tensor, sides: Sides, drawn: _Draws, generator: torch.Generator
) -> _Estimated:
    raw = mean_difference(resid, *sides)
    alive = differing_layers(raw, resid)
    direction = unit(raw).float() * alive[:, None]
    resampled = unit(differences(_bootstrap_weights(drawn.counts, sides), resid)) * alive[:, None]
    shuffled = drawn.permutations[:, sides[0]], drawn.permutations[:, sides[1]]
    null = differences(class_weights(*shuffled, resid.shape[0]), resid) * alive[:, None]
    vectors = unit(torch.randn(len(drawn.counts), resid.shape[2], generator=generator))
    scores = torch.einsum("nld,kd->nkl", resid, vectors)
    statistics = {
        f"stability_{name}": interval((resampled * direction).sum(-1)),
        f"separation_{name}": held_out_separation(resid, *sides) * alive,
        f"null_permuted_norm_{name}": null.norm(dim=-1).quantile(0.95, dim=0),
        f"null_permuted_separation_{name}": held_out_separation(resid, *shuffled).abs().quantile(0.95, dim=0),
        f"null_random_separation_{name}": d_prime(*(scores[side] for side in sides))
        .abs()
        .quantile(0.95, dim=0),
    }
    statistics[f"null_permuted_directions_{name}"] = unit(null[:KEPT_NULLS])
    return _Estimated(direction, raw.norm(dim=-1).float() * alive, resampled, unit(null), statistics)


@dataclass(frozen=True)
class Classes:
    """Index vectors of the two classes that each direction contrasts."""

    harmfulness: Sides
    refusal: Sides


def indices(keep: Iterable[bool]) -> Tensor:
    """Indices where ``keep`` holds."""
    return torch.tensor([i for i, kept in enumerate(keep) if kept], dtype=torch.long)


def refused_and_accepted(refused: Sequence[bool | None]) -> Sides:
    """Indices of refused and of accepted prompts; those not judged are in neither."""
    return indices(r is True for r in refused), indices(r is False for r in refused)


def classes(estimator: str, harmful: Sequence[bool], refused: Sequence[bool | None] | None) -> Classes:
    """Which prompts stand on which side, by estimator.

    Raises:
        AttackPlaneError: unknown estimator, ``zhao`` without replies, or fewer than four prompts on a side.
    """
    if estimator == "harc":
        sides = indices(harmful), indices(not h for h in harmful)
        found = Classes(sides, sides)
    elif estimator == "zhao":
        if refused is None:
            raise AttackPlaneError("the zhao estimator needs the model's own replies")
        pairs = list(zip(harmful, refused, strict=True))
        agreeing = indices(h and r is True for h, r in pairs), indices(not h and r is False for h, r in pairs)
        found = Classes(agreeing, refused_and_accepted(refused))
    else:
        raise AttackPlaneError("unknown estimator", got=estimator, remedy=f"one of {', '.join(ESTIMATORS)}")
    for name, (positive, negative) in vars(found).items():
        if min(len(positive), len(negative)) < SMALLEST_CLASS:
            raise AttackPlaneError(
                f"too few prompts for the {name} direction ({estimator})",
                got=f"{len(positive)} on the harmful or refused side, {len(negative)} on the other",
                remedy=f"at least {SMALLEST_CLASS} on each side; a model that never (or always) refuses has no "
                "zhao direction: use harc",
            )
    return found


def estimate(
    activations: Activations,
    harmful: Sequence[bool],
    *,
    estimator: str = "harc",
    refused: Sequence[bool | None] | None = None,
    config: EstimateConfig = EstimateConfig(),
) -> Directions:
    """Estimate both directions at every layer, with the statistics of the module's text.

    Args:
        activations: of the contrast prompts. harmful: their labels. refused: whether the model's own reply refused
            each (None: not judged), needed by ``zhao``; where given, ``harc`` reports cos(harc, zhao) too.
    """
    sides = classes(estimator, harmful, refused)
    at_inst, at_post = activations.at("t_inst"), activations.at("t_post_inst")
    generator = torch.Generator().manual_seed(config.seed)
    crossed = refused_and_accepted(refused) if refused is not None and estimator == "harc" else None
    if crossed is not None and min(map(len, crossed)) < SMALLEST_CLASS:
        crossed = None  # a model that never refuses has no zhao direction to compare with
    contrasts = [sides.harmfulness, sides.refusal, *([crossed] if crossed else [])]
    drawn = _draw(contrasts, len(at_inst), config.resamples, generator)
    h = _one_direction("harmfulness", at_inst, sides.harmfulness, drawn, generator)
    r = _one_direction("refusal", at_post, sides.refusal, drawn, generator)
    cosine = (h.direction * r.direction).sum(-1)
    pairs = unit(torch.randn(2, 10 * config.resamples, at_inst.shape[2], generator=generator))
    statistics = {
        **h.statistics,
        **r.statistics,
        "cos_harmfulness_refusal": cosine,
        "cos_harmfulness_refusal_interval": interval((h.resampled * r.resampled).sum(-1)),
        "null_permuted_cos": (h.permuted * r.permuted).sum(-1).abs().quantile(0.95, dim=0),
        "null_random_cos": (pairs[0] * pairs[1]).sum(-1).abs().quantile(0.95).repeat(len(cosine)),
        "layer_score": layer_score(
            cosine, h.statistics["separation_harmfulness"], r.statistics["separation_refusal"]
        ),
    }
    if crossed:
        z = _one_direction("zhao", at_post, crossed, drawn, generator)
        statistics["cos_harc_zhao"] = (r.direction * z.direction).sum(-1)
        statistics["cos_harc_zhao_interval"] = interval((r.resampled * z.resampled).sum(-1))
        statistics["null_permuted_cos_harc_zhao"] = (
            (r.permuted * z.permuted).sum(-1).abs().quantile(0.95, dim=0)
        )
    harmless = sides.harmfulness[1]
    return Directions(
        model=activations.model,
        estimator=estimator,
        harmfulness=h.direction,
        refusal=r.direction,
        harmfulness_norm=h.norm,
        refusal_norm=r.norm,
        harmless_t_inst=at_inst[harmless].double().mean(0).float(),
        harmless_t_post_inst=at_post[harmless].double().mean(0).float(),
        sample_counts={
            "harmfulness_positive": len(sides.harmfulness[0]),
            "harmfulness_negative": len(sides.harmfulness[1]),
            "refusal_positive": len(sides.refusal[0]),
            "refusal_negative": len(sides.refusal[1]),
        },
        statistics=statistics,
        settings={"resamples": config.resamples, "seed": config.seed},
    )


def layer_score(cosine: Tensor, separation_h: Tensor, separation_r: Tensor) -> Tensor:
    """(layer,) score (1 - |cos(harmfulness, refusal)|) * mean held-out d' of the two directions.

    HARC's Eq. 6 without response-side directions: its first factor times the class separation. Layers outside
    [4, n_layers - 4] score NaN (a sixth of the depth at each end in models of less than 12 layers).
    """
    n_layers = len(cosine) - 1
    edge = 4 if n_layers >= 12 else n_layers // 6
    score = (1 - cosine.abs()) * (separation_h + separation_r) / 2
    score[:edge] = torch.nan
    score[n_layers - edge + 1 :] = torch.nan
    return score


def best_layers(directions: Directions, top: int = 1) -> list[int]:
    """Layers with the highest layer score, best first."""
    score = directions.statistics["layer_score"].nan_to_num(-torch.inf)
    return score.topk(min(top, len(score))).indices.tolist()
