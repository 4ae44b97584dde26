"""Tests that decide: right by hand, at most 7 % false at a true null, and as strong as promised."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from core import significance
from core.significance import (
    LEVEL,
    draws_p,
    holm,
    mean_p,
    sign_flip_p,
    studentised_p,
    students_factor,
    units_needed,
)
from core.statistics import permutation_p
from geometry.contrasts import Contrast
from geometry.cross_half import cross_half
from geometry.resampling import reliability
from study.verdicts import NEAR_ORTHOGONAL, mean_check

STUDIES = 1000
FALSE = 0.07
"""Largest share of false decisions that is tolerated at a level of 0.05."""


# --- by hand --------------------------------------------------------------------------------------
def test_sign_flips_count_all_patterns():
    # sums of (1, 2, 3) with all signs: 6, 4, 2, 0, 0, -2, -4, -6; one is at least 6, two at least 4
    assert sign_flip_p([1, 2, 3]) == 1 / 8
    assert sign_flip_p([-1, 2, 3]) == 2 / 8
    assert sign_flip_p([1, 1, 1]) == 1 / 8  # three units that agree decide nothing
    assert sign_flip_p([0.0] * 8) == 1.0 and sign_flip_p([]) == 1.0
    assert sign_flip_p([2, 3, 4], threshold=1) == 1 / 8


def test_drawn_sign_flips_agree_with_scipys():
    values = np.random.default_rng(0).normal(0.4, size=20)
    theirs = scipy.stats.permutation_test(
        (values,), np.mean, permutation_type="samples", alternative="greater", n_resamples=9999
    )
    assert sign_flip_p(values) == pytest.approx(theirs.pvalue, abs=0.01)


def test_a_t_bootstrap_agrees_with_students_test_on_normal_differences():
    values = np.random.default_rng(3).normal(0.3, size=40)
    theirs = scipy.stats.ttest_1samp(values, 0.1, alternative="greater").pvalue
    assert studentised_p(values, threshold=0.1) == pytest.approx(theirs, abs=0.03)
    assert studentised_p([2.0] * 5, threshold=1) == 1 / 2000 and studentised_p([0.0] * 5) == 1
    mostly_equal = [0.0] * 22 + [-0.08, -0.06]
    assert studentised_p(mostly_equal, threshold=-0.1) == 1 / 2000  # far from the bound
    few, many = values[:8], values[:24]
    assert mean_p(few) == sign_flip_p(few)  # no bootstrap of few units
    assert mean_p(many) == max(sign_flip_p(many), studentised_p(many))


def test_holms_p_values_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_students_factor_and_the_units_needed():
    t = scipy.stats.t.ppf(0.95, 15) / scipy.stats.norm.ppf(0.95)
    assert students_factor(16) == pytest.approx(math.sqrt(16 / 15) * t, rel=1e-3)
    # (1.6449 + 0.8416)^2 / 0.25 + 1.6449^2 / 2 = 24.73 + 1.35
    assert units_needed(0.5, 1.0) == 27 and units_needed(-0.5, 1.0) == 27
    assert units_needed(0.0, 1.0) is None and units_needed(math.nan, 1.0) is None
    assert draws_p([1.0, 2.0, 3.0, math.nan], 1.5) == 3 / 5


# --- at a true null -------------------------------------------------------------------------------
@pytest.fixture
def few_draws(monkeypatch):
    """p to a thousandth is enough where many studies are simulated."""
    monkeypatch.setattr(significance, "DRAWN", 999)
    monkeypatch.setattr(significance, "RESAMPLED", 999)


def differences(n, mean, rng, kind):
    """(STUDIES, n) differences with standard deviation 1, or shares in {-1, 0, 1}."""
    if kind == "normal":
        return rng.normal(mean, size=(STUDIES, n))
    if kind == "long-tailed":
        return mean + rng.standard_t(3, size=(STUDIES, n)) / math.sqrt(3)
    return rng.choice([-1, 0, 1], p=[0.15, 0.7, 0.15], size=(STUDIES, n))


@pytest.mark.parametrize("n", [8, 16, 64])
@pytest.mark.parametrize("kind", ["normal", "long-tailed", "shares"])
def test_a_mean_of_nothing_is_seldom_called_something(n, kind, few_draws):
    rng = np.random.default_rng(n)
    p = [mean_p(row) for row in differences(n, 0.0, rng, kind)]
    assert np.mean(np.array(p) <= LEVEL) <= FALSE


def test_a_long_tail_below_deceives_sign_flips_and_not_the_p_of_a_mean(few_draws):
    rows = 1 - np.random.default_rng(0).exponential(size=(STUDIES, 24))
    flips = np.array([sign_flip_p(row) for row in rows])
    resampled = np.array([studentised_p(row) for row in rows])
    assert np.mean(flips <= LEVEL) > 0.09
    assert np.mean(np.maximum(flips, resampled) <= LEVEL) <= FALSE


@pytest.mark.parametrize("effect", [0.5, 0.8])
def test_the_promised_units_have_the_promised_power(effect, few_draws):
    n = units_needed(effect, 1.0)
    rng = np.random.default_rng(1)
    p = [mean_p(row) for row in differences(n, effect, rng, "normal")]
    assert np.mean(np.array(p) <= LEVEL) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("n", [8, 16, 64])
def test_a_direction_that_is_one_of_its_controls_is_seldom_called_more(n):
    """Every control's effect has noise of its own, and all share that of the prompts."""
    rng = np.random.default_rng(n)
    false = 0
    for _ in range(STUDIES):
        prompts, own = rng.normal(size=n), rng.normal(scale=0.5, size=(100, n))
        effects = (prompts + own + rng.normal(scale=0.3, size=(100, 1))).mean(1)
        false += permutation_p(effects[0], effects[1:]) <= LEVEL
    assert false / STUDIES <= FALSE


def pair_of_contrasts(n, cosine, strength, generator, d=48):
    """Two contrasts of the same n pairs, whose true directions have this cosine.

    They share a topic per pair and half of the noise of each prompt.
    """
    u, w = torch.zeros(2, d)
    u[0], w[0], w[1] = 1, cosine, math.sqrt(1 - cosine**2)
    topic = torch.randn(n, d, generator=generator)
    shared, *own = torch.randn(3, 2, n, d, generator=generator)
    units = tuple(map(str, (*range(n), *range(n))))
    contrasts = []
    for direction, noise in ((u, own[0]), (w, own[1])):
        items = topic + (shared + noise) / math.sqrt(2)
        items = items + strength * torch.tensor([0.5, -0.5])[:, None, None] * direction
        resid = items.flatten(0, 1)[:, None]
        contrasts.append(Contrast("made up", resid, torch.arange(n), torch.arange(n, 2 * n), units))
    return contrasts


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.slow
def test_an_angle_at_the_bound_is_seldom_called_smaller_or_larger(n):
    below = above = 0
    for seed in range(STUDIES):
        g = torch.Generator().manual_seed(seed)
        c = cross_half(*pair_of_contrasts(n, NEAR_ORTHOGONAL, 6.0, g), (0, 0), 200, g)
        below += draws_p(-c.draws, -NEAR_ORTHOGONAL) <= LEVEL
        above += draws_p(c.draws, NEAR_ORTHOGONAL) <= LEVEL
    assert below / STUDIES <= FALSE and above / STUDIES <= FALSE


@pytest.mark.slow
def test_directions_of_noise_are_seldom_called_alike():
    false = 0
    for seed in range(STUDIES):
        g = torch.Generator().manual_seed(seed)
        c = cross_half(*pair_of_contrasts(16, 1.0, 0.0, g), (0, 0), 99, g)
        false += c.p_labels <= LEVEL
    assert false / STUDIES <= FALSE


def test_three_units_that_agree_decide_nothing_and_eight_that_do_not_move_neither():
    assert mean_check("x", [1.0] * 3, unit="share").outcome == "unclear"
    assert mean_check("x", [0.0] * 8, unit="share").outcome == "unclear"
    assert mean_check("x", [1.0] * 8, unit="share").outcome == "yes"
    assert mean_check("x", [-1.0] * 8, unit="share").outcome == "no"


def test_below_obeys_its_controls_as_above_does():
    """Both directions of both kinds: beyond zero, but no further than the controls go."""
    values = np.linspace(0.5, 1.5, 16)
    wide = np.linspace(-2, 2, 99)
    for sign in (1, -1):
        for claimed in ("above", "below"):
            alone = mean_check("x", sign * values, unit="u", claimed=claimed)
            held = mean_check(
                "x", sign * values, unit="u", claimed=claimed, controls={"wide": wide}
            )
            assert alone.outcome in ("yes", "no") and held.outcome == "unclear"


# --- cosines without noise ------------------------------------------------------------------------
def test_the_closed_form_is_the_average_over_splits():
    g = torch.Generator().manual_seed(3)
    a, b = pair_of_contrasts(24, 0.5, 5.0, g)
    cross, own = [], ([], [])
    for _ in range(400):
        order = torch.randperm(24, generator=g)
        halves = [
            [(c.resid[h, 0] - c.resid[h + 24, 0]).mean(0) for h in (order[:12], order[12:])]
            for c in (a, b)
        ]
        cos = torch.nn.functional.cosine_similarity
        cross += [cos(halves[0][0], halves[1][1], 0), cos(halves[0][1], halves[1][0], 0)]
        for k in (0, 1):
            own[k].append(cos(*halves[k], 0))
    r = [float(torch.stack(values).mean()) for values in own]
    slow = float(torch.stack(cross).mean()) / math.sqrt(r[0] * r[1])
    assert cross_half(a, b, (0, 0), 20, g).value == pytest.approx(slow, abs=0.02)


def test_shared_noise_does_not_turn_orthogonal_directions_into_alike_ones():
    raw, clean, trust = [], [], []
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        a, b = pair_of_contrasts(32, 0.0, 3.0, g)
        c = cross_half(a, b, (0, 0), 2, g)
        raw.append(float(a.direction[0] @ b.direction[0]))
        clean.append(c.value)
        trust.append((c.trust[0], abs(float(a.direction[0, 0]))))
    assert np.mean(raw) > 0.1 and abs(np.mean(clean)) < 0.05
    estimated, true = np.mean(trust, axis=0)
    assert estimated == pytest.approx(true, abs=0.03)


def test_pairs_are_units_of_a_split():
    """A topic that pairs share cancels within them; split without them, it is noise."""
    g = torch.Generator().manual_seed(0)
    a, _ = pair_of_contrasts(48, 0.0, 2.5, g)
    topics = 2.0 * torch.randn(48, 1, 48, generator=g)
    paired = Contrast("p", a.resid + torch.cat([topics, topics]), a.positive, a.negative, a.units)
    alone = Contrast("a", paired.resid, a.positive, a.negative, tuple(map(str, range(96))))
    together, apart = (float(reliability(c, 24, 200, g).mean()) for c in (paired, alone))
    assert together > 0.45 and apart < 0.3
    mixed = Contrast("m", paired.resid, a.positive, a.negative.flip(0), a.units)
    first, second = mixed.aligned
    assert [a.units[i] for i in first] == [a.units[i] for i in second]
