"""Residuals with gradients, and a loss whose weights move."""

import copy
import dataclasses

import pytest
import torch

from attacks.objective import TargetLoss
from core.errors import AttackPlaneError
from core.models import wrap
from core.prompt import Conversation, Renderer
from geometry.activations import collect
from geometry.reading import differentiable_residuals
from tests.test_gcg import candidates_of, slot_of
from tests.test_geometry import REQUESTS


def prompts_of(loaded):
    renderer = Renderer(loaded)
    return [renderer.render(Conversation.build(r), "Sure, here it is") for r in REQUESTS]


def test_differentiable_residuals_equal_collected_ones(tiny):
    positions = ("t_inst", "t_post_inst", "response")
    prompts = prompts_of(tiny)
    with torch.no_grad():
        read = differentiable_residuals(tiny, prompts, positions=positions)
    expected = collect(tiny, prompts, REQUESTS, positions=positions).resid
    assert torch.allclose(read, expected, atol=1e-4)
    some = differentiable_residuals(tiny, prompts, positions=positions, layers=[2])
    assert torch.allclose(some[:, 0], expected[:, 2], atol=1e-4)


def movable(loaded):
    """A copy whose weights may be changed."""
    model = copy.deepcopy(loaded.model)
    model.requires_grad_(True)
    return wrap(model, loaded.tokenizer)


def test_gradients_flow_to_the_weights_and_are_those_of_finite_differences(qwen):
    own = movable(qwen)
    own.model.double()
    own = wrap(own.model, own.tokenizer)
    prompts = prompts_of(own)[:2]
    weight = own.blocks[0].mlp.down_proj.weight
    direction = torch.randn(own.d_model, generator=torch.Generator().manual_seed(0)).double()

    def projection():
        return (differentiable_residuals(own, prompts, layers=[2]) @ direction).sum()

    projection().backward()
    gradient = weight.grad[3, 5].item()
    assert own.blocks[2].mlp.down_proj.weight.grad is None  # it lies above the layer
    with torch.no_grad():
        values = []
        for step in (1e-3, -2e-3):
            weight[3, 5] += step
            values.append(float(projection()))
    assert gradient == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-2)


def test_what_cannot_be_read_is_told(qwen):
    prompts = prompts_of(qwen)
    with pytest.raises(AttackPlaneError, match="no such layer"):
        differentiable_residuals(qwen, prompts, layers=[99])
    bare = dataclasses.replace(prompts[0], target_ids=())
    with pytest.raises(AttackPlaneError, match="no such position"):
        differentiable_residuals(qwen, [bare], positions=("response",))
    with pytest.raises(AttackPlaneError, match="nothing to read"):
        differentiable_residuals(qwen, [])


@pytest.mark.parametrize("path", [None, "cached", "plain"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_loss_is_told_that_the_weights_changed(tiny_models, family, path):
    own = movable(tiny_models[family])
    slot = slot_of(own)
    objective = TargetLoss(own, slot, path=path)
    _, drawn = candidates_of(own, slot)
    before = objective.losses(drawn)
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    objective.weights_changed()
    fresh = TargetLoss(wrap(own.model, own.tokenizer), slot, path=path)
    assert torch.allclose(objective.losses(drawn), fresh.losses(drawn), atol=1e-5)
    assert not torch.allclose(objective.losses(drawn), before, atol=1e-2)
    (_, ours), (_, theirs) = (o.token_gradient(drawn[0]) for o in (objective, fresh))
    assert torch.allclose(ours, theirs, atol=1e-5)
