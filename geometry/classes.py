"""Where each class of prompts lies on the plane: centroid, spread, displacement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.readings import PlanePoint
from core.rows import Row
from core.statistics import RESAMPLES, bootstrap_columns
from geometry.plane import Nulls


def describe_classes(
    all_points: Sequence[PlanePoint],
    nulls: Nulls | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Row]:
    """Centroid, spread and displacement of each class, per target and frame.

    The centroid has a bootstrap interval. The displacement is from the plain request; ``displaced``
    is the number of behaviours that it rests on.

    Several prompts of a behaviour (variants of a class) are averaged first, so that each behaviour
    counts once; intervals resample behaviours. The displacement is the mean of (attacked - plain)
    with its own interval and nulls. The covariance is that of the points themselves, and None with
    fewer than two.

    ``wrapper`` is the mean displacement of harmless requests in the same wrappers, over the
    behaviours that have one, and ``wrapper_share`` how much of the class's displacement on each
    axis it is.
    """
    groups: dict[tuple[str, str, str], list[PlanePoint]] = {}
    for p in all_points:
        groups.setdefault((p.target, p.frame, p.class_name), []).append(p)
    rows = []
    for (target, frame, name), members in groups.items():
        first = members[0]
        spread = np.array([(p.x, p.y) for p in members])
        where = _by_behaviour([(p.behaviour_id, p.x, p.y) for p in members])
        moved = _by_behaviour([(p.behaviour_id, *p.moved) for p in members if p.moved])
        both = [(p.behaviour_id, p.wrapper, p.moved) for p in members if p.wrapper and p.moved]
        wrapper = _by_behaviour([(name, *own) for name, own, _ in both])
        same = _by_behaviour([(name, *whole) for name, _, whole in both])
        judged = [p.jailbroken for p in members if p.jailbroken is not None]
        none = {"null_random": None, "null_permuted": None}
        rows.append(
            {
                "target": target,
                "frame": frame,
                "class": name,
                "kind": first.kind,
                "attack": first.attack,
                "source": first.source,
                "layer": first.layer,
                "n": len(members),
                "judged": len(judged),
                "jailbroken": sum(judged),
                "centroid": where.mean(0).tolist(),
                "centroid_interval": bootstrap_columns(where, seed=seed, resamples=resamples),
                "covariance": np.cov(spread.T).tolist() if len(members) > 1 else None,
                "displaced": len(moved),
                "displacement": moved.mean(0).tolist() if len(moved) else None,
                "displacement_interval": bootstrap_columns(moved, seed=seed, resamples=resamples),
                "wrapper": wrapper.mean(0).tolist() if len(wrapper) else None,
                "wrapper_interval": bootstrap_columns(wrapper, seed=seed, resamples=resamples),
                "wrapper_share": _share(wrapper, same),
                **(nulls or {}).get((target, frame, name), none),
            }
        )
    return rows


def _share(wrapper: np.ndarray, moved: np.ndarray) -> list[float] | None:
    """[x, y] share of a mean displacement that the wrapper's own is."""
    if not len(moved):
        return None
    own, whole = wrapper.mean(0), moved.mean(0)
    return [float(a / b) if abs(b) > 1e-9 else 0.0 for a, b in zip(own, whole, strict=True)]


def _by_behaviour(rows: Sequence[tuple[str, float, float]]) -> np.ndarray:
    """(behaviour, x, y) of each prompt -> (behaviours, 2) means."""
    grouped: dict[str, list[tuple[float, float]]] = {}
    for behaviour, x, y in rows:
        grouped.setdefault(behaviour, []).append((x, y))
    return np.array([np.mean(points, 0) for points in grouped.values()]).reshape(-1, 2)
