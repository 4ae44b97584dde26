"""Rough passes: what they leave out is what they say, and nothing more."""

import copy
import dataclasses

import pytest
import torch
from transformers import DynamicCache

import attacks.packed_scorer
from attacks.likelihood import target_nll
from attacks.objective import TargetLoss
from tests.test_gcg import candidates_of, slot_of


def objective_of(loaded, slot, monkeypatch, following):
    """A loss whose rough passes are on a copy in the same precision, over the whole vocabulary."""
    monkeypatch.setattr(attacks.packed_scorer, "NEXT", following)
    monkeypatch.setattr(attacks.packed_scorer, "LIKELY", loaded.embedding_table.shape[0])
    monkeypatch.setattr(attacks.packed_scorer, "LIKELY_SHARE", 0.01)
    twin = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
    objective = TargetLoss(loaded, slot, rough=twin)
    objective.share(torch.tensor(slot.initial_ids))
    return objective


def token_by_token(loaded, slot, candidate, following):
    """The loss of one candidate whose states are the current suffix's but at the fed positions.

    Keys and values of all positions are kept from a plain pass over the current suffix. Fed tokens
    go through the model one at a time, in order, and each replaces those of its position.
    """
    target = torch.tensor(slot.target_ids)
    rest = [*slot.after_ids, *slot.target_ids[:-1]]
    now = torch.tensor([*slot.before_ids, *slot.initial_ids, *rest])
    ids = torch.tensor([*slot.before_ids, *candidate.tolist(), *rest])
    changed = (ids != now).nonzero()[:, 0].tolist()
    fed = {p + step for p in changed for step in range(following + 1) if p + step < len(ids)}
    fed |= set(range(len(ids) - len(target), len(ids)))
    cache = DynamicCache()
    with torch.no_grad():
        loaded.model(input_ids=now[None], past_key_values=cache)
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    logits = []
    for position in sorted(fed):
        until = DynamicCache()
        for n, states in enumerate(kept):
            until.update(*(s[:, :, :position] for s in states), n)
        with torch.no_grad():
            told = loaded.model(
                input_ids=ids[None, position : position + 1],
                position_ids=torch.tensor([[position]]),
                past_key_values=until,
            )
        for states, layer in zip(kept, until.layers, strict=True):
            for whole, new in zip(states, (layer.keys, layer.values), strict=True):
                whole[:, :, position] = new[:, :, -1]
        logits.append(told.logits[0, -1])
    return float(target_nll(torch.stack(logits[-len(target) :])[None], target, 0.0))


@pytest.mark.parametrize("n_replace", [1, 2])
def test_a_rough_pass_feeds_what_differs_what_follows_and_what_predicts(
    tiny, n_replace, monkeypatch
):
    slot = slot_of(tiny)
    _, drawn = candidates_of(tiny, slot, n_replace, width=6)
    objective = objective_of(tiny, slot, monkeypatch, following=1)
    rough = objective.rough_losses(drawn)
    expected = [token_by_token(tiny, slot, candidate, 1) for candidate in drawn]
    assert rough.tolist() == pytest.approx(expected, abs=1e-4)
    assert float((rough - objective.losses(drawn)).abs().max()) > 1e-3  # states were left out


def test_a_rough_pass_that_leaves_nothing_out_is_exact(tiny, monkeypatch):
    slot = slot_of(tiny)
    _, drawn = candidates_of(tiny, slot, width=12)
    objective = objective_of(tiny, slot, monkeypatch, following=100)
    exact = objective.losses(drawn)
    assert torch.allclose(objective.rough_losses(drawn), exact, atol=1e-4)
    objective.token_gradient(drawn[3])  # another suffix is the current one now
    assert torch.allclose(objective.rough_losses(drawn), exact, atol=1e-4)
    assert torch.allclose(objective.losses(drawn), exact, atol=1e-4)
    longer = torch.cat([drawn, drawn[:, :2]], 1)  # of another length: exactly
    assert torch.equal(objective.rough_losses(longer), objective.losses(longer))
