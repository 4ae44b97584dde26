"""Every loss of training: numbers derived by hand, which way it pushes, and padding that must not
matter."""

import math

import pytest
import torch

from training.losses import (
    IGNORED,
    away_loss,
    coupling_loss,
    dpo_loss,
    gathered,
    kl_loss,
    moved,
    reply_log_probability,
    reply_loss,
    rerouted,
)

THIRDS = [0.0, math.log(3.0)]
"""Logits of the probabilities 1/4 and 3/4."""


def slope(function, x):
    """Gradient of a loss at x."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(x), x)
    return gradient


def test_reply_loss_is_the_mean_of_the_labelled_tokens_and_raises_their_probability():
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.0], THIRDS])
    labels = torch.tensor([IGNORED, 0, 1])
    expected = (math.log(2) + math.log(4 / 3)) / 2
    assert float(reply_loss(logits, labels)) == pytest.approx(expected, abs=1e-6)
    gradient = slope(lambda x: reply_loss(x, labels), logits)
    assert gradient[0].abs().sum() == 0 and gradient[1, 0] < 0 and gradient[2, 1] < 0


def test_away_loss_is_the_hand_derived_number_and_lowers_the_probability():
    # p = 3/4: -log(1/4); p = 1/2: -log(1/2); mean of two labelled tokens
    logits = torch.tensor([THIRDS, [0.0, 0.0], [5.0, 5.0]])
    labels = torch.tensor([1, 0, IGNORED])
    expected = (math.log(4) + math.log(2)) / 2
    assert float(away_loss(logits, labels)) == pytest.approx(expected, abs=1e-6)
    gradient = slope(lambda x: away_loss(x, labels), logits)
    assert gradient[0, 1] > 0 and gradient[1, 0] > 0 and gradient[2].abs().sum() == 0


def test_away_loss_leaves_unlikely_tokens_alone_but_counts_them():
    unlikely = torch.tensor([[0.0, 6.0], THIRDS])  # log p of the label 0: about -6.002 < -5
    labels = torch.tensor([0, 1])
    assert float(away_loss(unlikely, labels)) == pytest.approx(math.log(4) / 2, abs=1e-6)
    assert slope(lambda x: away_loss(x, labels), unlikely)[0].abs().sum() == 0
    higher = float(away_loss(unlikely, labels, floor=-7.0))
    assert higher > math.log(4) / 2


def test_away_loss_stays_finite_where_the_target_is_certain():
    logits = torch.tensor([[40.0, 0.0]])
    assert float(away_loss(logits, torch.tensor([0]))) == pytest.approx(40.0, abs=1e-4)


def test_kl_is_the_hand_derived_number_and_vanishes_at_the_base():
    base, tuned = torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([THIRDS, [9.0, 0.0]])
    labels = torch.tensor([0, IGNORED])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(kl_loss(base, tuned, labels)) == pytest.approx(expected, abs=1e-6)
    assert float(kl_loss(base, base, torch.tensor([0, 0]))) == pytest.approx(0, abs=1e-7)
    gradient = slope(lambda x: kl_loss(base, x, labels), tuned)
    assert gradient[0, 0] < 0 < gradient[0, 1] and gradient[1].abs().sum() == 0
    # at temperature 2 the logits 0 and log 9 have the probabilities 1/4 and 3/4
    hot = torch.tensor([[0.0, math.log(9.0)]])
    one = torch.tensor([0])
    assert float(kl_loss(base[:1], hot, one, 2.0)) == pytest.approx(4 * expected, abs=1e-5)


def test_reply_log_probability_sums_each_reply_without_padding():
    logits = torch.tensor([THIRDS, [0.0, 0.0], THIRDS, [3.0, 1.0]])
    labels, owner = torch.tensor([1, 0, 0, IGNORED]), torch.tensor([0, 0, 1, 1])
    expected = [math.log(3 / 4) + math.log(1 / 2), math.log(1 / 4)]
    assert reply_log_probability(logits, labels, owner, 2).tolist() == pytest.approx(expected)


def test_dpo_is_log_two_at_the_base_and_raises_the_chosen_reply():
    chosen, rejected = torch.tensor([-3.0]), torch.tensor([-5.0])
    at_base = dpo_loss(chosen, rejected, chosen, rejected, 0.1)
    assert float(at_base) == pytest.approx(math.log(2), abs=1e-6)
    # a gain of 10 nats at beta 0.1: -log sigmoid(1)
    better = dpo_loss(chosen + 6, rejected - 4, chosen, rejected, 0.1)
    assert float(better) == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    assert slope(lambda x: dpo_loss(x, rejected, chosen, rejected, 0.1), chosen) < 0
    assert slope(lambda x: dpo_loss(chosen, x, chosen, rejected, 0.1), rejected) > 0


def test_coupling_pushes_harmful_states_up_to_the_margin_and_benign_ones_down_to_zero():
    v = torch.tensor([1.0, 0.0])
    #                     cos 0.6        cos 1        cos -0.6      cos 0.6
    states = torch.tensor([[3.0, 4.0], [2.0, 0.0], [-3.0, 4.0], [3.0, 4.0]])
    harmful = torch.tensor([True, True, False, False])
    expected = (0.3 + 0 + 0 + 0.6) / 4
    assert float(coupling_loss(states, v, harmful, 0.9)) == pytest.approx(expected, abs=1e-6)
    down = -slope(lambda x: coupling_loss(x, v, harmful, 0.9), states)
    assert down[0, 0] > 0 and down[3, 0] < 0 and down[1:3].abs().sum() == 0


def test_moved_is_the_mean_length_not_squared_and_padding_does_not_matter():
    base = torch.zeros(2, 3, 2)
    tuned = torch.tensor(
        [[[3.0, 4.0], [0.0, 0.0], [9.0, 9.0]], [[0.0, 2.0], [0.0, 0.0], [9.0, 9.0]]]
    )
    weight = torch.tensor([1.0, 3.0, 0.0])  # the last token is padding, the second stands in 3 rows
    assert float(moved(tuned, base, weight)) == pytest.approx((5 + 2) / (4 * 2))
    gradient = slope(lambda x: moved(x, base, weight), tuned)
    assert (gradient[0, 0] > 0).all() and gradient[:, 1:].abs().sum() == 0
    assert gradient.isfinite().all()


def test_rerouted_turns_states_away_until_they_are_orthogonal():
    base = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    tuned = torch.tensor([[[3.0, 4.0], [-1.0, 1.0], [7.0, 0.0]]])
    weight = torch.tensor([1.0, 1.0, 0.0])
    assert float(rerouted(tuned, base, weight)) == pytest.approx(0.6 / 2)
    down = -slope(lambda x: rerouted(x, base, weight), tuned)
    assert down[0, 0, 0] < 0 and down[0, 1:].abs().sum() == 0


def test_gathered_is_the_mean_over_all_pairs_and_makes_states_alike():
    states = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])  # of the pairs i != j both cosines are 0
    assert float(gathered(states)) == pytest.approx(1)
    three = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # 1 - cos: 0, 1 and 1, twice
    assert float(gathered(three)) == pytest.approx(2 / 3)
    assert float(gathered(states[:, :1])) == pytest.approx(0, abs=1e-6)
    down = -slope(gathered, states)
    assert down[0, 0, 1] > 0 and down[0, 1, 0] > 0
