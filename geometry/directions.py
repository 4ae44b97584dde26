"""Harmfulness and refusal directions by difference of means, with intervals and nulls.

    harmfulness        n( mean(t_inst | harmful)      - mean(t_inst | harmless) )        [Zhao 2507.11878; HARC 2607.00572]
    refusal, ``harc``  n( mean(t_post_inst | harmful) - mean(t_post_inst | harmless) )   the same sets [HARC]
    refusal, ``zhao``  n( mean(t_post_inst | refused) - mean(t_post_inst | accepted) )   by the model's own reply [Zhao];
                       its harmfulness uses harmful prompts refused and harmless ones accepted

n(.) makes a unit vector; every layer has its own. Directions point towards harmful and towards refused. Means are
accumulated in float64. On sets that are not filtered by the model's own behaviour the two concepts are confounded, so
cos(harc, zhao) is reported where both exist.

Statistics per layer (``Directions.statistics``), all from the activations at hand:

    cos_harmfulness_refusal            cosine of the two directions; ``_interval``: bootstrap over prompts, both classes
    stability_*                        bootstrap interval of the cosine between a resampled direction and the direction
    separation_*                       held-out d' = (difference of class means) / (pooled s.d.) along a direction that
                                       was estimated on the other half (two folds, averaged)
    null_random_*                      95th percentile over random unit directions
    null_permuted_*                    95th percentile over permuted labels, everything re-estimated
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from core.records import Activations, Directions

ESTIMATORS = ("harc", "zhao")
SMALLEST_CLASS = 4


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


def held_out_separation(
    resid: Tensor, positive: Tensor, negative: Tensor, orders: Tensor | None = None
) -> Tensor:
    """Two-fold held-out d' per layer: the direction from one half, d' on the other, both ways, averaged.

    ``positive`` and ``negative`` index prompts. With ``orders`` (draw, n_positive + n_negative), permutations of
    their concatenation, labels are permuted and the result is (draw, layer), else (layer,).
    """
    both = torch.cat([positive, negative])
    rows = both[orders if orders is not None else torch.arange(len(both))[None]]
    a, b = rows[:, : len(positive)], rows[:, len(positive) :]
    total = torch.zeros(len(rows), resid.shape[1])
    for fold in (0, 1):
        weights = class_weights(a[:, fold::2], b[:, fold::2], resid.shape[0])
        scores = torch.einsum("nld,kld->knl", resid, unit(differences(weights, resid)))
        draws = torch.arange(len(rows))[:, None]
        sides = scores[draws, a[:, 1 - fold :: 2]], scores[draws, b[:, 1 - fold :: 2]]
        total += d_prime(*(side.transpose(0, 1) for side in sides)) / 2
    return total if orders is not None else total[0]


def interval(draws: Tensor) -> Tensor:
    """(draw, layer) -> (layer, 2): the 2.5th and 97.5th percentiles."""
    ends = torch.tensor([0.025, 0.975], dtype=draws.dtype)
    return draws.quantile(ends, dim=0).T.contiguous()


def _resampled(index: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(draw, n) bootstrap resamples of an index vector."""
    return index[torch.randint(len(index), (draws, len(index)), generator=generator)]


def _permutations(n: int, draws: int, generator: torch.Generator) -> Tensor:
    """(draw, n) random permutations."""
    return torch.rand(draws, n, generator=generator).argsort(1)


@dataclass(frozen=True)
class Classes:
    """Index vectors of the two classes that each direction contrasts."""

    harmfulness: tuple[Tensor, Tensor]
    refusal: tuple[Tensor, Tensor]


def classes(estimator: str, harmful: Sequence[bool], refused: Sequence[bool | None] | None) -> Classes:
    """Which prompts stand on which side, by estimator.

    Raises:
        AttackPlaneError: unknown estimator, ``zhao`` without replies, or fewer than four prompts on a side.
    """

    def where(keep: list[bool]) -> Tensor:
        return torch.tensor([i for i, k in enumerate(keep) if k], dtype=torch.long)

    if estimator == "harc":
        sides = where(list(harmful)), where([not h for h in harmful])
        found = Classes(sides, sides)
    elif estimator == "zhao":
        if refused is None:
            raise AttackPlaneError("the zhao estimator needs the model's own replies")
        pairs = list(zip(harmful, refused, strict=True))
        found = Classes(
            (
                where([h and r is True for h, r in pairs]),
                where([not h and r is False for h, r in pairs]),
            ),
            (where([r is True for _, r in pairs]), where([r is False for _, r in pairs])),
        )
    else:
        raise AttackPlaneError("unknown estimator", got=estimator, remedy=f"one of {', '.join(ESTIMATORS)}")
    for name, sides in (("harmfulness", found.harmfulness), ("refusal", found.refusal)):
        if min(map(len, sides)) < SMALLEST_CLASS:
            raise AttackPlaneError(
                f"too few prompts for the {name} direction ({estimator})",
                got=f"{len(sides[0])} on the harmful or refused side, {len(sides[1])} on the other",
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
    raw = {
        "harmfulness": mean_difference(at_inst, *sides.harmfulness),
        "refusal": mean_difference(at_post, *sides.refusal),
    }
    direction = {name: unit(value).float() for name, value in raw.items()}
    cosine = (direction["harmfulness"] * direction["refusal"]).sum(-1)
    statistics: dict[str, Tensor] = {"cos_harmfulness_refusal": cosine}
    resid = {"harmfulness": at_inst, "refusal": at_post}
    split = {"harmfulness": sides.harmfulness, "refusal": sides.refusal}
    draws, n = config.resamples, at_inst.shape[0]

    # Bootstrap: where both directions contrast the same prompts, they share the resampled prompts.
    shared = estimator == "harc"
    boot: dict[str, Tensor] = {}
    permuted: dict[str, Tensor] = {}
    for name in ("harmfulness", "refusal"):
        if name == "harmfulness" or not shared:
            weights = class_weights(*(_resampled(side, draws, generator) for side in split[name]), n)
            both = torch.cat(split[name])
            orders = _permutations(len(both), draws, generator)
            count = len(split[name][0])
            null_weights = class_weights(both[orders[:, :count]], both[orders[:, count:]], n)
        boot[name] = unit(differences(weights, resid[name]))
        null = differences(null_weights, resid[name])
        permuted[name] = unit(null)
        statistics[f"null_permuted_norm_{name}"] = null.norm(dim=-1).quantile(0.95, dim=0)
        statistics[f"stability_{name}"] = interval((boot[name] * direction[name]).sum(-1))
        statistics[f"separation_{name}"] = held_out_separation(resid[name], *split[name])
        statistics[f"null_permuted_separation_{name}"] = (
            held_out_separation(resid[name], *split[name], orders).abs().quantile(0.95, dim=0)
        )
        vectors = unit(torch.randn(draws, at_inst.shape[2], generator=generator))
        scores = torch.einsum("nld,kd->nkl", resid[name], vectors)
        statistics[f"null_random_separation_{name}"] = (
            d_prime(*(scores[side] for side in split[name])).abs().quantile(0.95, dim=0)
        )
    statistics["cos_harmfulness_refusal_interval"] = interval((boot["harmfulness"] * boot["refusal"]).sum(-1))
    statistics["null_permuted_cos"] = (
        (permuted["harmfulness"] * permuted["refusal"]).sum(-1).abs().quantile(0.95, dim=0)
    )
    pairs = unit(torch.randn(2, draws * 10, at_inst.shape[2], generator=generator))
    statistics["null_random_cos"] = (
        (pairs[0] * pairs[1]).sum(-1).abs().quantile(0.95).expand(cosine.shape).clone()
    )
    statistics["layer_score"] = layer_score(
        cosine, statistics["separation_harmfulness"], statistics["separation_refusal"]
    )
    if estimator == "harc" and refused is not None:
        try:
            zhao = classes("zhao", harmful, refused)
        except AttackPlaneError:
            pass  # a model that never refuses has no zhao direction; the statistic is then absent
        else:
            other = unit(mean_difference(at_post, *zhao.refusal)).float()
            statistics["cos_harc_zhao"] = (direction["refusal"] * other).sum(-1)
    harmless = sides.harmfulness[1]
    return Directions(
        model=activations.model,
        estimator=estimator,
        harmfulness=direction["harmfulness"],
        refusal=direction["refusal"],
        harmfulness_norm=raw["harmfulness"].norm(dim=-1).float(),
        refusal_norm=raw["refusal"].norm(dim=-1).float(),
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
    [4, n_layers - 4] score NaN (fewer are cut from models of less than 12 layers: a third of the depth in all).
    """
    n_layers = len(cosine) - 1
    edge = min(4, n_layers // 6)
    score = (1 - cosine.abs()) * (separation_h + separation_r) / 2
    score[:edge] = torch.nan
    score[n_layers - edge + 1 :] = torch.nan
    return score


def best_layers(directions: Directions, top: int = 1) -> list[int]:
    """Layers with the highest layer score, best first."""
    score = directions.statistics["layer_score"].nan_to_num(-torch.inf)
    return score.topk(min(top, len(score))).indices.tolist()
