"""Every statistic against scipy or scikit-learn, or by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from core.statistics import (
    Ranked,
    auroc,
    bootstrap_columns,
    bootstrap_mean,
    cluster_rows,
    cluster_weights,
    percentile_interval,
    permutation_p,
    ranks,
    spearman,
    wilson,
)

RNG = np.random.default_rng(3)


def test_the_bootstrap_of_a_mean_agrees_with_scipys():
    values = RNG.gamma(2.0, size=60)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap_mean(values, resamples=8000)
    assert ours == pytest.approx(tuple(theirs), abs=0.03)
    assert bootstrap_mean([]) is None and bootstrap_mean([2.0, 2.0]) == (2.0, 2.0)


def test_columns_have_the_interval_that_each_has_alone():
    values = RNG.normal(size=(20, 3))
    together = bootstrap_columns(values)
    alone = [list(bootstrap_mean(column)) for column in values.T]
    assert np.allclose(together, alone)
    assert bootstrap_columns(np.zeros((0, 2))) is None


@pytest.mark.parametrize(("successes", "n"), [(0, 4), (1, 7), (7, 10), (30, 31)])
def test_wilson_agrees_with_scipys(successes, n):
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx(tuple(theirs), abs=1e-6)
    assert all(math.isnan(end) for end in wilson(0, 0))


def test_auroc_agrees_with_scikit_learn_ties_included_on_arrays_and_tensors():
    labels = RNG.random(80) < 0.4
    scores = np.round(RNG.normal(size=80) + labels, 1)  # rounded: many ties
    theirs = sklearn.metrics.roc_auc_score(labels, scores)
    assert auroc(scores[labels], scores[~labels]) == pytest.approx(theirs)
    u = scipy.stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
    assert theirs == pytest.approx(u / labels.sum() / (~labels).sum())
    many = torch.tensor(np.stack([scores, -scores], 1))
    both = auroc(many[torch.tensor(labels)], many[torch.tensor(~labels)])
    assert both.tolist() == pytest.approx([theirs, 1 - theirs])


def test_ranks_and_spearman_agree_with_scipys_ties_included():
    a, b = np.round(RNG.normal(size=50), 1), np.round(RNG.normal(size=50), 1)
    assert np.array_equal(ranks(a), scipy.stats.rankdata(a))
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert spearman([1.0, 1.0], [1.0, 2.0]) == 0.0 and spearman([1.0], [2.0]) == 0.0


def test_a_permutation_p_is_scipys_and_never_zero():
    a, b = RNG.normal(0.8, size=12), RNG.normal(size=12)
    value = a.mean() - b.mean()
    rng, both = np.random.default_rng(0), np.concatenate([a, b])
    drawn = [rng.permutation(both) for _ in range(4000)]
    null = [row[:12].mean() - row[12:].mean() for row in drawn]
    theirs = scipy.stats.permutation_test(
        (a, b),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        n_resamples=4000,
        alternative="greater",
        vectorized=True,
        rng=np.random.default_rng(1),
    ).pvalue
    assert permutation_p(value, null) == pytest.approx(theirs, abs=0.02)
    assert permutation_p(9.0, [0.0] * 99) == 0.01


def test_clusters_are_drawn_whole():
    clusters = np.array([0, 0, 1, 2, 2, 2])
    members = {0: {0, 1}, 1: {2}, 2: {3, 4, 5}}
    for rows in cluster_rows(clusters, resamples=50, rng=np.random.default_rng(0)):
        drawn = [int(clusters[r]) for r in rows]
        for c, own in members.items():
            assert drawn.count(c) % len(own) == 0
            assert {int(r) for r in rows if clusters[r] == c} in (own, set())


def test_percentiles_leave_out_what_is_no_number():
    assert all(math.isnan(end) for end in percentile_interval([float("nan")]))
    assert percentile_interval([*range(101), float("nan")]) == (2.5, 97.5)


def test_scores_sorted_once_give_the_auroc_of_any_resample_ties_included():
    rng = np.random.default_rng(3)
    scores = rng.integers(6, size=50).astype(float)
    scores[7] = np.nan
    won, clusters = rng.random(50) < 0.4, rng.integers(9, size=50)
    rows = np.flatnonzero(np.arange(50) % 3 > 0)
    ranked = Ranked(scores, rows)
    draws = [
        list(of(clusters, resamples=20, rng=np.random.default_rng(0)))
        for of in (cluster_rows, cluster_weights)
    ]
    for drawn, weights in zip(*draws, strict=True):
        assert np.array_equal(np.bincount(drawn, minlength=50), weights)
        kept = drawn[np.isin(drawn, rows) & (drawn != 7)]
        positive, negative = scores[kept[won[kept]]], scores[kept[~won[kept]]]
        value, pairs = ranked.auroc(won, weights)
        assert pairs == len(positive) * len(negative)
        assert value == pytest.approx(float(auroc(positive, negative)))
    assert math.isnan(ranked.auroc(np.zeros(50, dtype=bool))[0])
    assert math.isnan(Ranked(scores[:0]).auroc(won[:0])[0])
