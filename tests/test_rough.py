"""The rough copy: what it rounds, that nothing else is coarse, and when a layer stays exact."""

import pytest
import torch
import transformers
from torch import nn

from attacks.objective import TargetLoss
from attacks.rough import RoughLinear, RoughModel, _Now
from attacks.screening import rough_copy
from core.models import load
from core.products import LINEAR
from tests import conftest
from tests.test_gcg import candidates_of, slot_of


def rough_layer(layer, x0, dtype=torch.int8):
    """A twin of ``layer`` that knows what it took and gave, and compares token with token."""
    twin = RoughLinear(layer.in_features, layer.out_features, layer.bias is not None)
    twin.load_state_dict(layer.state_dict())
    twin.now = _Now()
    twin.round_to(dtype)
    twin.now.known[twin] = x0, layer(x0).detach() / twin.scale
    twin.now.rows = lambda: torch.arange(len(x0))
    return twin


def test_a_difference_is_rounded_by_token_and_a_weight_by_output():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, 0.014], [-0.5, 12.7]]))
        layer.bias.copy_(torch.tensor([5.0, -3.0]))
    x0 = torch.tensor([[100.0, -7.0], [2.0, 2.0]])
    twin = rough_layer(layer, x0)
    assert twin.coarse.T.tolist() == [[127, 1], [-5, 127]]  # steps of 0.01 and 0.1
    x = x0 + torch.tensor([[1.27, -0.004], [0.0, -12.7]])  # -0.004 is less than half a step
    added = torch.tensor([[1.27 * 1.27, -0.5 * 1.27], [-12.7 * 0.01, -12.7 * 12.7]])
    with torch.no_grad():
        assert torch.allclose(twin(x[None])[0], layer(x0) + added, atol=1e-4)


def test_an_outlying_channel_that_all_tokens_share_costs_no_precision():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    x0 = torch.randn(8, 64, generator=generator)
    x0[:, 3] = 3000.0
    x = x0 + 0.1 * torch.randn(8, 64, generator=generator)
    with torch.no_grad():
        error = (rough_layer(layer, x0)(x[None])[0] - layer(x)).abs().max()
        plain = (rough_layer(layer, torch.zeros_like(x0))(x[None])[0] - layer(x)).abs().max()
    assert float(error) < 5e-3 < 1.0 < float(plain)


def test_a_layer_that_sees_other_rows_than_the_tokens_stays_exact():
    """As an expert does, which takes the tokens that are routed to it."""
    layer, x0 = nn.Linear(4, 3), torch.ones(5, 4)
    twin = rough_layer(layer, x0)
    some = torch.randn(1, 2, 4)
    assert torch.equal(twin(some), layer(some)) and torch.equal(twin(some[0]), layer(some[0]))
    many = torch.randn(1, 5, 4)
    assert not torch.equal(twin(many), layer(many))
    twin.now.known.clear()
    assert torch.equal(twin(many), layer(many))


@pytest.fixture
def linear(tiny):
    """A tiny model whose blocks hold linear layers, as all but GPT-2's do."""
    if not any(type(m) in LINEAR for m in tiny.decoder.modules()):
        assert rough_copy(tiny) is None
        pytest.skip("no linear layers")
    return tiny


def test_a_copy_that_rounds_nothing_gives_the_exact_states(linear):
    slot = slot_of(linear)
    _, drawn = candidates_of(linear, slot, width=8)
    objective = TargetLoss(linear, slot, rough=RoughModel(linear, torch.float32))
    scorer, copy = objective.scorer, objective.scorer.rough.loaded
    objective.token_gradient(torch.tensor(slot.initial_ids))
    runs = []
    copy.decoder.register_forward_pre_hook(lambda *a: runs.append(a))
    several = [*drawn, drawn[0][:-2], torch.cat([drawn[1], drawn[1][:3]])]
    for current in (None, drawn[2]):
        if current is not None:
            objective.share(current)
        assert not runs  # the copy never runs the current suffix
        exact = scorer.hidden(several)
        assert torch.allclose(scorer.hidden(several, rough=True), exact, atol=1e-4)
        assert runs
        runs.clear()
    layers = [m for m in copy.decoder.modules() if isinstance(m, RoughLinear)]
    assert len(layers) == len(scorer._known) > 0  # every layer compares
    with torch.no_grad():
        layers[0].coarse.zero_()  # the copy's own
    assert not torch.allclose(scorer.hidden(several, rough=True), exact, atol=1e-4)
    objective.weights_changed()  # the copy is of the weights before
    assert torch.equal(objective.rough_losses(drawn), objective.losses(drawn))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rough_losses_are_close_and_nothing_of_the_model_changes(linear, dtype):
    slot = slot_of(linear)

    def what_is_there():
        weights = {n: (p.data_ptr(), p.dtype) for n, p in linear.model.named_parameters()}
        return weights, [len(m._forward_hooks) for m in linear.model.modules()]

    before = what_is_there()
    objective = TargetLoss(linear, slot, rough=RoughModel(linear, dtype))
    assert objective.path == "packed"
    _, drawn = candidates_of(linear, slot, width=16)
    objective.share(torch.tensor(slot.initial_ids))
    exact = objective.losses(drawn)
    bounds = objective.scorer.bounds(objective.scorer.hidden(list(drawn)))
    error = objective.rough_losses(drawn) - bounds
    assert 0 < float(error.abs().max()) < 0.05 * float(exact.max() - exact.min()) + 1e-3
    assert what_is_there() == before


def test_two_slots_of_one_copy_keep_their_own_current_suffix(linear):
    slot = slot_of(linear)
    _, drawn = candidates_of(linear, slot, width=8)
    rough, alone = RoughModel(linear), TargetLoss(linear, slot, rough=RoughModel(linear))
    first, second = (TargetLoss(linear, slot, rough=rough) for _ in range(2))
    for objective in (first, alone):
        objective.share(torch.tensor(slot.initial_ids))
    second.share(drawn[0])
    assert torch.equal(first.rough_losses(drawn), alone.rough_losses(drawn))
    assert not torch.equal(first.rough_losses(drawn), second.rough_losses(drawn))


def test_a_family_that_norms_queries_and_keys_has_a_copy_too(tmp_path, monkeypatch):
    monkeypatch.setitem(conftest.FAMILIES, "olmo2", (transformers.Olmo2Config, {}, "chatml"))
    loaded = load(str(conftest.make_model(tmp_path, "olmo2")), "cpu")
    slot = slot_of(loaded)
    _, drawn = candidates_of(loaded, slot, width=8)
    objective = TargetLoss(loaded, slot, rough=RoughModel(loaded))
    objective.share(torch.tensor(slot.initial_ids))
    bounds = objective.scorer.bounds(objective.scorer.hidden(list(drawn)))
    error = objective.rough_losses(drawn) - bounds
    assert 0 < float(error.abs().max()) < 0.1


def test_a_hook_on_a_layer_acts_once_in_the_copy(tiny_folders):
    loaded = load(str(tiny_folders["llama"]), "cpu")
    chosen = loaded.blocks[1].mlp.down_proj
    chosen.register_forward_hook(lambda layer, args, given: given + 1.0)
    slot = slot_of(loaded)
    _, drawn = candidates_of(loaded, slot, width=8)
    objective = TargetLoss(loaded, slot, rough=RoughModel(loaded, torch.float32))
    objective.share(torch.tensor(slot.initial_ids))
    exact = objective.scorer.hidden(list(drawn))
    assert torch.allclose(objective.scorer.hidden(list(drawn), rough=True), exact, atol=1e-4)


def test_a_suffix_of_one_token_has_rough_losses(qwen):
    slot = slot_of(qwen)
    objective = TargetLoss(qwen, slot, rough=RoughModel(qwen))
    short = torch.tensor(slot.initial_ids[:1])
    objective.share(short)
    others = torch.tensor([[5], [9], [11]])
    bounds = objective.scorer.bounds(objective.scorer.hidden(list(others)))
    assert float((objective.rough_losses(others) - bounds).abs().max()) < 0.1


def test_a_cpu_without_integer_products_has_no_copy(qwen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert rough_copy(qwen) is not None
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert rough_copy(qwen) is None
