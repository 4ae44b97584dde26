"""Resampling, nulls, reliability, coupling, layer criteria, prediction and verdicts against
hand-derived or independent values."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from core.errors import AttackPlaneError
from core.readings import PlanePoint
from core.statistics import auroc
from geometry.carriers import Carrier
from geometry.contrasts import Contrast, centred_by, held_out_separation, unit
from geometry.coupling import (
    effective_rank,
    hrci,
    layer_closeness,
    principal_cosines,
    random_pair,
    subspace,
    subspace_overlap,
)
from geometry.effects import summary
from geometry.layers import Candidate, arditi_choice, choose, eq6, inner_layers
from geometry.prediction import (
    EITHER,
    POOLED,
    centroid_distances,
    held_out_scores,
    regress,
    success_auroc,
    success_prediction,
)
from geometry.resampling import (
    cosine_statistics,
    permuted,
    permuted_sides,
    reliability,
    resampled,
    spearman_brown,
)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(n=40, d=32, layers=3, strength=2.0, seed=0, units=None, direction=None, noise=1.0):
    """n positive then n negative items that differ by ``strength`` along one direction a layer, in
    noise."""
    direction = (
        unit(torch.randn(layers, d, generator=g(seed + 100))) if direction is None else direction
    )
    resid = noise * torch.randn(2 * n, layers, d, generator=g(seed))
    resid[:n] += strength * direction
    names = units or tuple(map(str, range(2 * n)))
    return Contrast("planted", resid, torch.arange(n), torch.arange(n, 2 * n), names), direction


# --- contrasts ------------------------------------------------------------------------------------
def test_a_contrast_finds_its_planted_direction_and_knows_dead_layers():
    c, direction = planted(n=400, strength=8.0)
    assert ((c.direction * direction).sum(-1) > 0.99).all() and c.alive.tolist() == [1, 1, 1]
    c.resid[:, 0] = 3.0
    assert c.alive.tolist() == [0, 1, 1] and c.direction[0].norm() == 0


def test_a_contrast_within_groups_is_a_regression_with_group_effects():
    generator = torch.Generator().manual_seed(0)
    harmful = [True] * 60 + [False] * 60
    refused = [True] * 45 + [False] * 15 + [True] * 15 + [False] * 45
    h, r = torch.eye(8)[:2]
    x = 0.1 * torch.randn(120, 1, 8, generator=generator)
    x += 3 * h * torch.tensor(harmful)[:, None, None] + r * torch.tensor(refused)[:, None, None]
    sides = torch.tensor(refused).nonzero()[:, 0], (~torch.tensor(refused)).nonzero()[:, 0]
    units = tuple(map(str, range(120)))
    usual = Contrast("usual", x, *sides, units).direction[0]
    within = Contrast("within", centred_by(x, harmful), *sides, units).direction[0]
    design = torch.tensor(
        [[float(b), float(a), 1.0] for a, b in zip(harmful, refused, strict=True)]
    )
    slope = torch.linalg.lstsq(design, x[:, 0]).solution[0]
    assert torch.allclose(within, slope / slope.norm(), atol=1e-5)
    assert usual @ h > 0.8 and abs(within @ h) < 0.1 and within @ r > 0.98
    assert torch.equal(centred_by(x, [0] * 120), x)
    means = [centred_by(x, harmful)[k : k + 60].mean(0) for k in (0, 60)]
    assert torch.allclose(means[0], means[1], atol=1e-5)
    assert torch.allclose(means[0], (x[:60].mean(0) + x[60:].mean(0)) / 2, atol=1e-5)


def test_resampled_directions_equal_means_over_the_drawn_units():
    # two units on each side; whatever is drawn, the direction is one of those that can be made by
    # hand
    resid = torch.tensor([[[4.0, 0]], [[0, 4.0]], [[0.0, 0]], [[0.0, 0]]])
    c = Contrast("c", resid, torch.tensor([0, 1]), torch.tensor([2, 3]), ("a", "b", "c", "d"))
    drawn = resampled([c], 200, g())[0][:, 0]
    possible = {(1.0, 0.0), (0.0, 1.0), (0.7071, 0.7071)}
    found = {tuple(round(v, 4) for v in row) for row in drawn.tolist()}
    assert found == possible
    both = (drawn[:, 0] > 0.1) & (drawn[:, 1] > 0.1)
    assert both.float().mean() == pytest.approx(0.5, abs=0.12)


def test_contrasts_that_share_units_are_resampled_together():
    c, _ = planted()
    a, b = resampled([c, Contrast("same", c.resid, c.positive, c.negative, c.units)], 20, g())
    assert torch.equal(a, b)
    p, q = permuted([c, Contrast("same", c.resid, c.positive, c.negative, c.units)], 20, g())
    assert torch.equal(p, q)


def test_permuted_sides_deal_every_item_once():
    c, _ = planted(n=5)
    positive, negative = permuted_sides([c], 30, g())[0]
    assert all(
        sorted(row) == list(range(10)) for row in torch.cat([positive, negative], 1).tolist()
    )
    assert len({tuple(sorted(row)) for row in positive.tolist()}) > 20


def test_reliability_follows_the_signal_to_noise_formula():
    # two samples of m a side: E cos = S / (S + N), S = strength^2, N = d * 2 / m
    c, _ = planted(n=400, d=64, strength=2.0)
    for m in (8, 64, 200):
        expected = 4.0 / (4.0 + 64 * 2 / m)
        assert float(reliability(c, m, 60, g()).mean()) == pytest.approx(expected, abs=0.06)
    assert abs(float(reliability(c, 200, 60, g(), shuffle=True).mean())) < 0.1
    halves = float(reliability(c, 200, 60, g()).mean())
    truth = unit(torch.randn(3, 64, generator=g(100)))
    assert spearman_brown(halves) == pytest.approx(
        float((c.direction * truth).sum(-1).mean()), abs=0.03
    )
    assert spearman_brown(0.5) == pytest.approx(math.sqrt(2 / 3))


def test_cosine_statistics_tell_a_planted_angle_from_its_nulls():
    d = 64
    u = unit(torch.randn(1, d, generator=g(7)))
    w = unit(torch.randn(1, d, generator=g(8)))
    w = unit(w - (w * u).sum() * u)
    first, _ = planted(n=200, d=d, layers=1, strength=6.0, direction=u)
    second, _ = planted(n=200, d=d, layers=1, strength=6.0, direction=0.6 * u + 0.8 * w, seed=5)
    s = cosine_statistics(first, second, 200, g())
    low, high = s["interval"][0].tolist()
    assert (
        float(s["value"][0]) == pytest.approx(0.6, abs=0.03)
        and low < s["value"][0] < high < 0.7
        and low > 0.5
    )
    assert float(s["null_permuted"][0]) < 0.45 and 0.15 < float(s["null_random"][0]) < 0.35


def test_auroc_by_hand_and_held_out():
    assert float(auroc(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0, 1.0]))) == pytest.approx(
        (3 + 1.5) / 6
    )
    c, _ = planted(n=40, strength=6.0)
    assert (held_out_separation(c.resid, c.positive, c.negative, auroc) > 0.98).all()
    noise, _ = planted(n=100, strength=0.0, layers=20)
    assert held_out_separation(
        noise.resid, noise.positive, noise.negative, auroc
    ).mean() == pytest.approx(0.5, abs=0.04)


# --- coupling -------------------------------------------------------------------------------------
def test_coupling_measures_by_hand():
    x, y, z = torch.eye(3, dtype=torch.float64)
    a, b = torch.stack([x, y]), torch.stack([x, (y + z) / math.sqrt(2)])
    assert principal_cosines(a, b).tolist() == pytest.approx([1, math.sqrt(0.5)])
    assert subspace_overlap(a, b) == pytest.approx(0.75) and subspace_overlap(
        a, a
    ) == pytest.approx(1)
    assert layer_closeness(3, 7) == pytest.approx(math.exp(-1)) and layer_closeness(5, 5) == 1
    assert hrci(0.5, 0.25, 1.0) == pytest.approx(0.4 * 0.5 + 0.4 * 0.25 + 0.2)
    assert hrci(0.5, 0.25) == pytest.approx(0.375)


def test_effective_rank_by_hand_and_row_normalised():
    assert effective_rank(torch.eye(4), normalise=False) == pytest.approx(4)
    assert effective_rank(torch.ones(5, 3), normalise=False) == pytest.approx(1)
    rows = torch.diag(torch.tensor([10.0, 1.0]))  # q = 100/101, 1/101
    q = np.array([100, 1]) / 101
    assert effective_rank(rows, normalise=False) == pytest.approx(math.exp(-(q * np.log(q)).sum()))
    assert effective_rank(rows, normalise=True) == pytest.approx(2)
    assert effective_rank(torch.zeros(2, 2), normalise=True) == 0


@pytest.mark.parametrize(("n", "rank"), [(31, 31), (60, 20), (200, 64), (5, 2)])
def test_subspaces_and_ranks_by_the_gram_matrix_are_those_of_the_svd(n, rank):
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(n, rank, generator=generator) @ torch.randn(rank, 64, generator=generator)
    decomposed = torch.linalg.svd(unit(rows.double()), full_matrices=False)
    found = subspace(rows)
    assert torch.allclose(found @ found.T, torch.eye(3, dtype=torch.float64), atol=1e-10)
    k = min(3, rank)
    assert subspace_overlap(found[:k], decomposed.Vh[:k]) == pytest.approx(1)
    q = decomposed.S**2 / (decomposed.S**2).sum()
    expected = float(torch.exp(-(q * q.clamp_min(1e-300).log()).sum()))
    assert effective_rank(rows, normalise=True) == pytest.approx(expected)


def test_the_leading_subspace_of_planted_rows_is_found():
    frame = torch.linalg.qr(torch.randn(40, 3, generator=g()).double()).Q.T
    rows = torch.randn(100, 3, generator=g(1)).double() @ frame
    assert subspace_overlap(subspace(rows), frame) == pytest.approx(1)
    with pytest.raises(AttackPlaneError, match="too few"):
        subspace(rows[:2])


def test_random_nulls_equal_their_published_values():
    # at d = 4096, k = 3: E|cos| about 0.0125 and C_sub about 3/4096 = 0.0007
    generator = g()
    pairs = torch.tensor([random_pair(4096, generator) for _ in range(300)])
    assert float(pairs[:, 0].abs().mean()) == pytest.approx(0.0125, rel=0.15)
    assert float(pairs[:, 1].mean()) == pytest.approx(3 / 4096, rel=0.15)


# --- layers ---------------------------------------------------------------------------------------
def test_eq6_by_hand():
    e = torch.eye(4)
    h, r = e[0][None], (0.6 * e[0] + 0.8 * e[1])[None]
    h_response, r_response = (0.8 * e[0] + 0.6 * e[2])[None], e[1][None]
    # (1 - 0.6) (1 - 0) * 0.8 * 0.8
    assert float(eq6(h, r, h_response, r_response)) == pytest.approx(0.4 * 0.8 * 0.8)
    assert float(eq6(h, h, h_response, r_response)) == 0


def test_arditi_chooses_what_the_official_code_chooses():
    """The published rule in plain words of its own (select_direction.py), on random tables."""

    def official(table, n):
        best, found = None, None
        for c in table:
            if any(math.isnan(v) for v in (c.refusal, c.steering, c.kl)):
                continue
            if c.layer >= int(n * (1.0 - 0.2)) or c.kl > 0.1 or c.steering < 0.0:
                continue
            if best is None or -c.refusal > best:
                best, found = -c.refusal, c
        return found

    rng = np.random.default_rng(0)
    chosen = 0
    for n in (10, 12, 30, 32):
        for _ in range(50):
            table = [
                Candidate(str(p), layer, *rng.normal(size=2).round(1), abs(rng.normal(0.1, 0.1)))
                for p in range(-5, 0)
                for layer in range(n)
            ]
            table[3] = dataclasses.replace(table[3], refusal=-99.0, steering=math.nan)
            passed = arditi_choice(table, n)
            assert (passed[0] if passed else None) == official(table, n)
            chosen += bool(passed)
    assert chosen > 150
    on_the_edge = [Candidate("-1", 8, -9.0, 1.0, 0.0), Candidate("-1", 7, 0.0, 0.0, 0.1)]
    assert arditi_choice(on_the_edge, 10) == on_the_edge[1:]  # layer < 8, steering >= 0, KL <= 0.1


def test_criteria_look_at_inner_layers_only():
    score = torch.arange(31.0)
    assert choose({"s": score}, 30) == {"s": 26} and inner_layers(30).start == 4
    assert choose({"s": -score}, 30) == {"s": 4}
    assert list(inner_layers(4)) == [1, 2, 3, 4]


def test_a_carrier_is_scored_as_stated():
    c = Carrier("-1", 3, torch.ones(1), 1.0, comply=0.5, refuse=0.2, kl=0.1)
    assert c.admissible and c.score == pytest.approx(0.6)
    assert not Carrier("-1", 3, torch.ones(1), 1.0, 0.5, 0.2, 0.11).admissible


# --- effects --------------------------------------------------------------------------------------
def outcome(behaviour, mode, kind, complied, strength=1.0):
    return {
        "model": "m",
        "label": "harmful",
        "behaviour_id": behaviour,
        "mode": mode,
        "operation": "ablate" if mode != "none" else "none",
        "strength": strength if mode != "none" else 0.0,
        "kind": kind,
        "complied": complied,
        "refused": None,
        "neither": 0.0,
        "refusal": -1.0,
        "d": 0.5,
        "log_odds": -2.0,
        "kl": 0.0,
        "delta_norm": 2.0,
    }


def test_effects_by_hand():
    rows = []
    for b, alone, own, random, wrong, matched in (
        ("a", 0, 1, (0, 1), 0, (0, 0)),
        ("b", 0, 1, (0, 0), 1, (1, 0)),
    ):
        rows += [outcome(b, "none", "none", alone), outcome(b, "R", "intervention", own)]
        rows += [outcome(b, "R", "random", v) for v in random] + [
            outcome(b, "R", "wrong_layer", wrong)
        ]
        rows += [outcome(b, "R", "matched", v) for v in matched]
    found = {r["outcome"]: r for r in summary(rows)}
    # no reply was judged as refused
    assert set(found) == {"complied", "neither", "refusal", "d", "log_odds", "kl"}
    r = found["complied"]
    assert (r["alone"], r["value"], r["change"], r["n"]) == (0, 1, 1, 2)
    assert r["controls"] == pytest.approx(1 / 3) and r["effect_controls"] == pytest.approx(2 / 3)
    assert r["matched"] == pytest.approx(0.25) and r["effect_matched"] == pytest.approx(0.75)
    assert r["effect_matched_interval"] == pytest.approx([0.5, 1.0])


# --- prediction -----------------------------------------------------------------------------------
def point(behaviour, name, x, y, won, target="m"):
    return PlanePoint(
        prompt_id=f"{behaviour} {name}",
        behaviour_id=behaviour,
        kind="attack",
        class_name=name,
        label="harmful",
        attack=name,
        source="s",
        target=target,
        frame="own",
        layer=1,
        x=x,
        y=y,
        x_cosine=0.0,
        y_cosine=0.0,
        x_t_goal=None,
        cos_base_own_harmfulness=1.0,
        cos_base_own_refusal=1.0,
        jailbroken=won,
    )


def test_within_class_auroc_compares_prompts_of_one_class_only():
    # in each class success is the lower x; over both classes x would say the contrary
    points = [point(f"b{i}", "low", i, 0.0, i < 2) for i in range(6)]
    points += [point(f"b{i}", "high", 100 + i, 0.0, i < 5) for i in range(6)]
    rows = {(r["class"], r["score"]): r for r in success_prediction(points, draws=50, resamples=50)}
    assert (
        rows["low", "H"]["auroc"] == 1
        and rows["high", "H"]["auroc"] == 1
        and rows[POOLED, "H"]["auroc"] == 1
    )
    assert rows[POOLED, "R"]["auroc"] == 0.5
    assert (POOLED, EITHER) not in rows and (
        POOLED,
        "H moved",
    ) not in rows  # no plain request was sent


def test_suppression_is_measured_from_the_plain_request():
    # x itself says nothing, since plain requests lie as far apart as attacked ones; what moved does
    points = []
    for i in range(8):
        p = point(f"b{i}", "a", 10.0 * (i // 2) - 3.0 * (i % 2), 0.0, i % 2 == 1)
        points.append(dataclasses.replace(p, plain_x=10.0 * (i // 2), plain_y=0.0))
    points.append(dataclasses.replace(point("b9", "plain", 0.0, 0.0, True), attack="plain"))
    rows = {(r["class"], r["score"]): r for r in success_prediction(points, draws=50, resamples=50)}
    assert rows[POOLED, "H moved"]["auroc"] == 1 and rows[POOLED, EITHER]["auroc"] == 1
    assert rows[POOLED, "H"]["auroc"] < 0.8 and {c for c, _ in rows} == {"a", POOLED}


def test_labels_of_paired_items_are_swapped_within_their_pair():
    units = ("a", "b", "c", "a", "b", "d")
    c = Contrast(
        "c", torch.randn(6, 1, 4, generator=g()), torch.arange(3), torch.arange(3, 6), units
    )
    positive, negative = permuted_sides([c], 60, g())[0]
    for p, n in zip(positive.tolist(), negative.tolist(), strict=True):
        assert sorted(p + n) == list(range(6))
        for pair in ((0, 3), (1, 4)):
            assert len(set(pair) & set(p)) == 1 and len(set(pair) & set(n)) == 1
    assert len({tuple(sorted(row)) for row in positive.tolist()}) == 8


def regression_data(rng, slope, behaviours=16):
    """D depends on H moved, and on behaviour and class by themselves; R moved is nothing to it."""
    b, c = (a.ravel() for a in np.meshgrid(np.arange(behaviours), np.arange(4), indexing="ij"))
    moved = rng.normal(size=(len(b), 2)) + 3 * c[:, None] + 2 * (b % 3)[:, None]
    outcome = slope * moved[:, 0] + 5.0 * c - b + 0.5 * rng.normal(size=len(b))
    return moved, outcome, [f"b{n}" for n in b], [f"class {n}" for n in c]


def test_the_regression_finds_the_slope_within_classes_and_behaviours():
    moved, outcome, b, c = regression_data(np.random.default_rng(0), 2.0)
    h, r = regress(moved, outcome, b, c).values()
    # by hand: the same by least squares on all dummies at once
    groups, classes = (np.unique(names, return_inverse=True)[1] for names in (b, c))
    design = np.column_stack([moved, np.eye(16)[groups], np.eye(4)[classes]])
    slope = np.linalg.lstsq(design, outcome, rcond=None)[0][0]
    others = design[:, 1:]
    x = design[:, 0] - others @ np.linalg.lstsq(others, design[:, 0], rcond=None)[0]
    assert h.slope == pytest.approx(slope * x.std()) and slope == pytest.approx(2.0, abs=0.2)
    assert h.p < 0.001 and h.p_below > 0.9 and r.p > 0.05 and r.p_below > 0.05
    assert h.interval[0] < h.slope < h.interval[1] and h.score > 0.9
    constant = np.column_stack([moved[:, 0], np.zeros(len(moved))])
    assert set(regress(constant, outcome, b, c)) == {"H"}


def test_the_regression_seldom_finds_what_is_not_there():
    rng = np.random.default_rng(1)
    found = [regress(*regression_data(rng, 0.0, 12), resamples=2) for _ in range(400)]
    for name in "HR":
        assert np.mean([rows[name].p <= 0.05 for rows in found]) <= 0.07


def test_scores_from_moments_are_those_of_one_classifier_for_each_group():
    rng = np.random.default_rng(0)
    where, success = rng.normal(size=(60, 2)) + 50, rng.random(60) < 0.4
    groups = rng.integers(0, 9, 60) * 3
    expected = np.zeros(60)
    for group in np.unique(groups):
        test = groups == group
        yes, no = where[~test & success], where[~test & ~success]
        centred = np.concatenate([yes - yes.mean(0), no - no.mean(0)])
        spread = centred.T @ centred
        spread += (1e-6 * np.trace(spread) + 1e-12) * np.eye(2)
        weights = np.linalg.solve(spread, yes.mean(0) - no.mean(0))
        expected[test] = (where[test] - (yes.mean(0) + no.mean(0)) / 2) @ weights
    assert held_out_scores(where, success, groups) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    one = np.arange(60) == 7  # without that group there is one outcome only
    assert held_out_scores(where, one, np.arange(60))[7] == 0


def test_success_auroc_by_hand():
    value, pairs = success_auroc(np.array([1.0, 2.0, 2.0]), np.array([False, True, False]))
    assert (value, pairs) == (0.75, 2)
    assert math.isnan(success_auroc(np.array([1.0]), np.array([True]))[0])


def test_held_out_scores_never_see_their_own_behaviour():
    rng = np.random.default_rng(0)
    success = np.arange(40) % 2 == 0
    where = rng.normal(size=(40, 2)) + 3.0 * success[:, None]
    assert success_auroc(held_out_scores(where, success, np.arange(40)), success)[0] > 0.9
    # one behaviour alone: nothing to learn from
    assert (held_out_scores(where, success, np.zeros(40, int)) == 0).all()


def test_centroid_distance_by_hand_and_its_null():
    points = [point(f"b{i}", "a", 3.0, 4.0 + i, True) for i in range(8)] + [
        point(f"b{i}", "b", 0.0, float(i), True) for i in range(8)
    ]
    row = centroid_distances(points)[0]
    assert row["distance"] == pytest.approx(5.0) and row["interval"] == pytest.approx([5.0, 5.0])
    assert row["classes"] == ["a", "b"] and row["null_95"] < 5.0
