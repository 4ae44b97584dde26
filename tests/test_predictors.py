"""Predictors of transfer: planted ones come first, random ones do not; missing stays missing."""

import math

import numpy as np
import pytest

from core.statistics import wilson
from study.sparse_transfer import SparseTransfer, matrix_rows
from transfer.predictors import (
    Predictor,
    Transfers,
    gap,
    needed,
    of_target,
    predictions,
    transfers_of,
)


def planted(n=12, behaviours=40, seed=0):
    """Targets whose weakness alone decides which prompts succeed on them."""
    rng = np.random.default_rng(seed)
    weakness = np.linspace(0.1, 0.9, n)
    draws = rng.random((n, n, behaviours)) < weakness[None, :, None]
    arms = tuple("r2d2" if i % 2 else "sft" for i in range(n))
    names = tuple(f"c{i}" for i in range(n))
    return Transfers(names, arms, draws.astype(float)), weakness, rng


def test_a_predictor_that_ranks_by_construction_comes_out_first_and_a_random_one_does_not():
    transfers, weakness, rng = planted()
    predictors = [
        Predictor("random", rng.normal(size=12)),
        Predictor("weakness", -weakness),
        Predictor("gap of weakness", weakness, gap),
    ]
    rows = predictions(transfers, predictors, resamples=100, permutations=99)
    everyone = [r for r in rows if r["targets"] == "all"]
    assert everyone[0]["predictor"] == "weakness" and everyone[0]["rho"] < -0.9
    assert everyone[0]["p"] == 1 / 100 and everyone[0]["interval"][1] < -0.8
    assert everyone[0]["n_pairs"] == 12 * 11 and everyone[0]["n_targets"] == 12
    random = next(r for r in everyone if r["predictor"] == "random")
    assert random["p"] > 0.05 and random["interval"][0] < 0 < random["interval"][1]
    beyond = everyone[0]["beyond"]["random"]
    assert beyond["value"] > 0.5 and beyond["interval"][0] > 0
    assert {r["targets"] for r in rows} == {"all", "sft", "r2d2"}
    assert all(r["n_targets"] == 6 for r in rows if r["targets"] == "sft")


def test_a_random_predictor_seldom_seems_to_predict():
    """Pairs that share a checkpoint must not count as independent."""
    false = 0
    for seed in range(40):
        transfers, _, rng = planted(n=8, behaviours=10, seed=seed)
        row = predictions(
            transfers, [Predictor("random", rng.normal(size=8))], resamples=2, permutations=59
        )[0]
        false += row["p"] <= 0.05
    assert false / 40 <= 0.12


def test_few_targets_rank_nothing_and_say_how_many_would():
    transfers, weakness, _ = planted(n=3)
    assert predictions(transfers, [Predictor("weakness", weakness)]) == []
    # ((1.6449 + 0.8416) / atanh(0.5))^2 + 3
    expected = math.ceil((2.4865 / math.atanh(0.5)) ** 2 + 3)
    assert needed(0.5) == needed(-0.5) == expected == 24
    assert needed(0.0) is None


def test_success_by_name_becomes_an_array_and_missing_stays_missing():
    success = {("a", "b", "x"): 1.0, ("a", "b", "y"): 0.0, ("a", "a", "x"): 1.0, ("a", "a", "y"): 0}
    transfers = transfers_of(success, ["a", "b"], {"a": "sft"})
    assert transfers.arms == ("sft", None)
    assert transfers.tasr()[0].tolist() == [0.5, 0.5] and np.isnan(transfers.tasr()[1]).all()
    given = transfers.given_source().tasr()
    assert given[0].tolist() == [1.0, 1.0]  # on x, where a's prompt succeeds on a
    assert transfers.tasr(np.array([3.0, 1.0]))[0, 1] == pytest.approx(0.75)


def test_pairs_by_hand():
    values = np.array([1.0, 3.0])
    assert of_target(values).tolist() == [[1, 3], [1, 3]]
    assert gap(values).tolist() == [[0, 2], [2, 0]]


def test_cells_of_the_matrix_by_hand():
    def between(values):
        return transfers_of(values, ["a", "b"], {"a": "sft"})

    judged = {("a", "a", "x"): 1.0, ("a", "a", "y"): 0.0, ("a", "b", "x"): 0.0}
    leaning = {("a", "b", "x"): -2.0, ("a", "b", "y"): -1.0}
    rows = matrix_rows(SparseTransfer(between(judged), between(leaning)))
    own, other = rows  # nothing was made on b
    assert (own["source"], own["target"], own["behaviours"]) == ("a", "a", 2)
    assert own["tasr"] == 0.5 and own["tasr_interval"] == pytest.approx(wilson(1, 2))
    assert own["tasr_given_source"] == 1.0 and own["d"] is None and own["d_interval"] is None
    assert other["tasr"] == 0.0 and other["d"] == -1.5
    assert other["d_interval"] == pytest.approx((-2.0, -1.0))
