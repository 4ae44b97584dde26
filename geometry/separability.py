"""Do attack classes occupy regions of the plane? A linear classifier on held-out behaviours.

Classifier: linear discriminant analysis on (x, y) with equal priors,

    argmax_c  m_c^T S^-1 p - m_c^T S^-1 m_c / 2,    S = pooled within-class covariance (ridge 1e-6
              of its mean variance)

Held out: all points of a behaviour are predicted by a classifier that saw none of them (up to ten
folds of behaviours), so that
it cannot learn a request in place of an attack. Accuracy is balanced: the mean over classes of the
share of points predicted
right. Null: labels permuted within each behaviour, ``draws`` times, the whole procedure anew.
Interval: percentile bootstrap over behaviours of the held-out predictions. The same draws say how
sure it is that the accuracy is more, or less, than ``MARGIN`` beyond that of permuted labels
(``p_present``, ``p_absent``); of fewer than 12 behaviours no bootstrap is asked, and permutations
alone decide.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.readings import PlanePoint
from core.records import PLAIN
from core.rows import Row
from core.significance import FEWEST, draws_p
from core.statistics import cluster_rows, percentile_interval, permutation_p

FOLDS = 10
MARGIN = 0.05
"""Accuracy beyond the permuted labels' that counts as none."""

AT_ONCE = 2_000_000
"""Permuted labels times classes that are scored at once: 16 MB each time they are held."""


def held_out_predictions(
    where: np.ndarray, labels: np.ndarray, folds: np.ndarray, classes: int
) -> np.ndarray:
    """(n, 2) points, (draws, n) labels and (n,) folds -> (draws, n) predicted labels."""
    predicted = np.empty(labels.shape, dtype=int)
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        x = where[train]
        onehot = (labels[:, None, train] == np.arange(classes)[:, None]).astype(float)  # (d, c, n)
        found = onehot.sum(2)
        counts = np.maximum(found, 1e-9)
        means = onehot @ x / counts[..., None]
        within = x.T @ x - np.einsum("dc,dcf,dcg->dfg", counts, means, means)
        spread = np.trace(within, axis1=1, axis2=2)[:, None, None] / 2
        inverse = np.linalg.pinv(within + (1e-6 * spread + 1e-12) * np.eye(2))
        weights = np.einsum("dcf,dfg->dcg", means, inverse)
        scores = weights @ where[test].T - 0.5 * (weights * means).sum(2)[..., None]
        scores[found == 0] = -np.inf
        predicted[:, test] = scores.argmax(1)
    return predicted


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(draws, n) labels and predictions -> (draws,) share predicted right, a mean over classes."""
    right, onehot = (labels == predicted)[..., None], np.eye(classes)[labels]
    counts = onehot.sum(1)
    shares = np.where(counts > 0, (right * onehot).sum(1) / np.maximum(counts, 1), np.nan)
    return np.nanmean(shares, 1)


def separability(
    points: Sequence[PlanePoint], *, draws: int = 200, resamples: int = 1000, seed: int = 0
) -> Row | None:
    """Held-out accuracy of telling the classes of these points apart.

    None with fewer than two classes or three behaviours.
    """
    names = sorted({p.class_name for p in points})
    behaviours = sorted({p.behaviour_id for p in points})
    if len(names) < 2 or len(behaviours) < 3:
        return None
    rng = np.random.default_rng(seed)
    where = np.array([(p.x, p.y) for p in points])
    number = {name: n for n, name in enumerate(names)}
    labels = np.array([number[p.class_name] for p in points], dtype=np.int16)
    _, groups = np.unique([p.behaviour_id for p in points], return_inverse=True)
    folds = rng.permutation(len(behaviours))[groups] % FOLDS
    permuted = np.tile(labels, (draws, 1))
    for group in range(len(behaviours)):
        inside = np.nonzero(groups == group)[0]
        permuted[:, inside] = rng.permuted(permuted[:, inside], axis=1)
    predicted = held_out_predictions(where, labels[None], folds, len(names))[0]
    parts = np.array_split(permuted, min(draws, -(-permuted.size * len(names) // AT_ONCE)))
    nulls = np.concatenate(
        [
            balanced_accuracy(
                part, held_out_predictions(where, part, folds, len(names)), len(names)
            )
            for part in parts
        ]
    )
    resampled = [
        balanced_accuracy(labels[rows][None], predicted[rows][None], len(names))[0]
        for rows in cluster_rows(groups, resamples=resamples, rng=rng)
    ]
    accuracy = float(balanced_accuracy(labels[None], predicted[None], len(names))[0])
    few = len(behaviours) < FEWEST
    return {
        "classes": names,
        "n": len(points),
        "behaviours": len(behaviours),
        "accuracy": accuracy,
        "interval": percentile_interval(resampled),
        "chance": 1 / len(names),
        "null_mean": float(nulls.mean()),
        "null_95": float(np.quantile(nulls, 0.95)),
        "p": permutation_p(accuracy, nulls),
        "p_present": 0.0 if few else draws_p(resampled, nulls.mean() + MARGIN),
        "p_absent": 1.0 if few else draws_p(-np.array(resampled), -(nulls.mean() + MARGIN)),
        "recall": {n: float((predicted[labels == c] == c).mean()) for c, n in enumerate(names)},
    }


def separabilities(points: Sequence[PlanePoint]) -> list[Row]:
    """All classes against each other, and each against the plain request, per target and frame.

    The field ``against`` says which. Each row has one p-value, not corrected for their number.
    """
    rows = []
    for target, frame in dict.fromkeys((p.target, p.frame) for p in points):
        here = [p for p in points if (p.target, p.frame, p.kind) == (target, frame, "attack")]
        plain = [p for p in here if p.attack == PLAIN]
        one_plain = list(
            {p.behaviour_id: p for p in reversed(plain)}.values()
        )  # the same prompt from several sources
        others = [p for p in here if p.attack != PLAIN]
        for name in ("all", *dict.fromkeys(p.class_name for p in others)):
            chosen = others if name == "all" else [p for p in others if p.class_name == name]
            # plain requests of the same behaviours only: a class known by its requests would seem
            # separable
            kept = {p.behaviour_id for p in chosen if name != "all"}
            scores = separability([*chosen, *(p for p in one_plain if p.behaviour_id in kept)])
            if scores:
                rows.append(
                    {
                        "target": target,
                        "frame": frame,
                        "against": PLAIN if name != "all" else "all",
                        "class": name,
                        **scores,
                    }
                )
    return rows
