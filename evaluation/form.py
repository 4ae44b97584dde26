"""Does the form of prompts give their label away?

A linear discriminant on form alone: the last token, the first word, the length in tokens,
characters and words, and punctuation. What it can tell, a direction from the same prompts can tell
too, and is then no direction of harm.

    score(x) = w . x,   w = (S + ridge I)^-1 (mean(harmful) - mean(harmless)),   S within-class

Held out: ten folds of whole pairs, so that both prompts of a pair are scored by a discriminant that
saw neither. 0.5 is chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.statistics import auroc

FOLDS = 10
RIDGE = 0.01
PUNCTUATION = "?.,!:'\""


def form_features(
    texts: Sequence[str], last_tokens: Sequence[int], lengths: Sequence[int]
) -> np.ndarray:
    """(n, features) float64, each column scaled to variance one."""
    first = [text.split()[0].lower() for text in texts]
    columns = [[float(word == other) for word in first] for other in sorted(set(first))]
    columns += [
        [float(token == other) for token in last_tokens] for other in sorted(set(last_tokens))
    ]
    columns += [[float(text.count(sign)) for text in texts] for sign in PUNCTUATION]
    columns += [list(map(float, lengths)), [float(len(text)) for text in texts]]
    columns += [[float(len(text.split())) for text in texts]]
    features = np.array(columns).T
    spread = features.std(0)
    return (features[:, spread > 0] - features[:, spread > 0].mean(0)) / spread[spread > 0]


def form_auroc(
    texts: Sequence[str],
    last_tokens: Sequence[int],
    lengths: Sequence[int],
    harmful: Sequence[bool],
    groups: Sequence[str],
    *,
    seed: int = 0,
) -> float:
    """Held-out AUROC of the label from form alone.

    Args:
        lengths: tokens of each text.
        groups: the pair that each text belongs to; a pair is never split between folds.
    """
    x, y = form_features(texts, last_tokens, lengths), np.array(harmful)
    names, member = np.unique(list(groups), return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(names))[member] % FOLDS
    areas, weights = [], []
    for held_out in np.unique(fold):
        train, test = fold != held_out, fold == held_out
        yes, no = x[train & y], x[train & ~y]
        if not len(yes) or not len(no) or not y[test].any() or y[test].all():
            continue
        centred = np.concatenate([yes - yes.mean(0), no - no.mean(0)])
        within = centred.T @ centred / len(centred) + RIDGE * np.eye(x.shape[1])
        scores = x[test] @ np.linalg.solve(within, yes.mean(0) - no.mean(0))
        areas.append(float(auroc(scores[y[test]], scores[~y[test]])))
        weights.append(int(y[test].sum()) * int((~y[test]).sum()))
    return float(np.average(areas, weights=weights)) if areas else float("nan")
