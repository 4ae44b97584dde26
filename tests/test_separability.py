"""Separability: planted regions are found, meaningless classes are not, and a class is never told
by its requests."""

import dataclasses

import numpy as np
import pytest

from core.readings import PlanePoint
from geometry.separability import (
    balanced_accuracy,
    held_out_predictions,
    separabilities,
    separability,
)


def point(behaviour, attack, x, y, target="t", frame="own"):
    return PlanePoint(
        f"{behaviour}{attack}",
        behaviour,
        "attack",
        attack,
        "harmful",
        attack,
        "s",
        target,
        frame,
        1,
        x,
        y,
        0.0,
        0.0,
        None,
        1.0,
        1.0,
        None,
    )


def cloud(shift, behaviours=20, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 5, (behaviours, 2))  # requests differ more than attacks do
    rows = []
    for b, (x, y) in enumerate(centres):
        for name, offset in (("plain", 0.0), ("gcg", shift)):
            noise = rng.normal(0, 0.3, 2)
            rows.append(point(f"b{b}", name, x * 0.1 + noise[0] + offset, y + noise[1]))
    return rows


def test_balanced_accuracy_by_hand():
    labels, predicted = np.array([[0, 0, 0, 1]]), np.array([[0, 0, 1, 1]])
    assert balanced_accuracy(labels, predicted, 2).tolist() == [pytest.approx((2 / 3 + 1) / 2)]
    assert balanced_accuracy(labels, predicted, 3).tolist() == [
        pytest.approx((2 / 3 + 1) / 2)
    ]  # an absent class


def test_permuted_labels_in_parts_are_those_at_once(monkeypatch):
    whole = separability(cloud(0.5))
    monkeypatch.setattr("geometry.separability.AT_ONCE", 500)
    assert separability(cloud(0.5)) == whole


def test_the_classifier_is_linear_discriminant_analysis():
    # one fold held out: means (0, 0) and (4, 0), equal spread: the boundary is x = 2
    where = np.array(
        [[-1.0, 0], [1, 0], [0, 1], [0, -1], [3, 0], [5, 0], [4, 1], [4, -1], [1.9, 3], [2.1, -3]]
    )
    labels = np.array([[0] * 4 + [1] * 4 + [0, 0]])
    folds = np.array([0] * 8 + [1] * 2)
    assert held_out_predictions(where, labels, folds, 2)[0, 8:].tolist() == [0, 1]


def test_planted_regions_are_told_apart_and_beat_the_null():
    found = separability(cloud(3.0))
    assert found["accuracy"] > 0.95 and found["p"] < 0.02 and found["null_95"] < 0.75
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
    assert found["recall"]["gcg"] > 0.9 and found["chance"] == 0.5


def test_classes_without_a_region_are_at_chance():
    found = [separability(cloud(0.0, seed=s))["p"] for s in range(12)]
    assert sum(p < 0.05 for p in found) <= 2
    assert abs(separability(cloud(0.0, behaviours=60))["null_mean"] - 0.5) < 0.05


def test_a_classifier_cannot_learn_a_request_in_place_of_an_attack():
    # every behaviour has a region of its own, and the attack does not move it: held-out behaviours
    # are at chance
    rows = [point(f"b{b}", a, 10.0 * b, 0.0) for b in range(12) for a in ("plain", "gcg")]
    assert separability(rows)["accuracy"] <= 0.6


def test_too_little_to_say_anything_is_none():
    assert separability([point("b0", "gcg", 0, 0), point("b0", "plain", 1, 1)]) is None
    assert separability([point(f"b{i}", "gcg", i, 0) for i in range(9)]) is None


def test_plain_requests_of_several_sources_count_once_and_of_the_same_behaviours_only():
    rows = cloud(3.0)
    again = [dataclasses.replace(p, source="u") for p in rows if p.attack == "plain"]
    persona = [
        dataclasses.replace(p, attack="persona", class_name="persona")
        for p in rows
        if p.attack == "gcg"
    ][:5]
    found = {r["class"]: r for r in separabilities([*rows, *again, *persona])}
    assert found["gcg"]["n"] == 40 and found["persona"]["n"] == 10 and found["all"]["n"] == 25
    assert found["all"]["against"] == "all" and found["gcg"]["against"] == "plain"
    anchors = [dataclasses.replace(p, kind="anchor") for p in rows]
    assert separabilities(anchors) == []
