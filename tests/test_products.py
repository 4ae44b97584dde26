"""Products by oneDNN: torch's own values and gradients, and only where they may stand in."""

import json

import pytest
import torch
from torch import nn

import core.products
from attacks.objective import TargetLoss
from core.measured import is_faster
from core.models import load
from core.products import FrozenLinear, linear, packed, use_faster_products
from tests.test_gcg import slot_of

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def used(monkeypatch):
    """How many products oneDNN computed; it may take small ones."""
    calls = []
    monkeypatch.setattr(core.products, "SMALLEST", 0)
    product = core.products._product
    monkeypatch.setattr(core.products, "_product", lambda *a: calls.append(1) or product(*a))
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_values_and_gradients_are_torchs_own(used, shape, bias):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator)
    added = torch.randn(7, generator=generator) if bias else None
    input = torch.randn(*shape, generator=generator).requires_grad_(True)
    ours, own = linear(input, weight, added), nn.functional.linear(input, weight, added)
    assert used and ours.shape == own.shape and torch.allclose(ours, own, atol=1e-6)
    upstream = torch.randn(own.shape, generator=generator)
    gradients = [torch.autograd.grad(given, input, upstream)[0] for given in (ours, own)]
    assert torch.allclose(*gradients, atol=1e-6)
    strided = torch.randn(4, 10, generator=generator)[:, ::2]
    with torch.no_grad():
        assert torch.allclose(linear(strided, weight), strided @ weight.T, atol=1e-6)


def test_other_types_trained_weights_and_autocast_go_the_plain_way(used):
    weight, input = torch.randn(7, 5), torch.randn(3, 5)
    linear(input.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(input, weight).dtype == torch.bfloat16
    trained = weight.clone().requires_grad_(True)
    linear(input, trained).sum().backward()
    assert trained.grad is not None
    bias = torch.zeros(7, requires_grad=True)
    linear(input, weight, bias).sum().backward()
    assert bias.grad is not None and not used
    linear(input, weight)
    assert used


def test_only_plain_float32_layers_are_changed_and_only_where_it_pays(monkeypatch):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), Own(2, 2), nn.Tanh())
    monkeypatch.setattr(core.products, "_onednn_is_faster", lambda: False)
    use_faster_products(model)
    assert type(model[0]) is nn.Linear
    monkeypatch.setattr(core.products, "_onednn_is_faster", lambda: True)
    use_faster_products(model)
    assert type(model[0]) is nn.Linear  # too small
    monkeypatch.setattr(core.products, "SMALLEST", 4)
    use_faster_products(model)
    assert [type(m) for m in model] == [FrozenLinear, nn.Linear, Own, nn.Tanh]


def test_what_is_faster_is_measured_once_and_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ATTACK_PLANE_CACHE", str(tmp_path))
    asked = []

    def measure(new, plain):
        return lambda: asked.append(new) or (new, plain)

    assert is_faster("trial", ["a"], measure(0.5, 1.0), 0.6)
    assert is_faster("trial", ["a"], measure(9.0, 1.0), 0.6)  # kept: the machine is busy now
    assert not is_faster("trial", ["b"], measure(0.7, 1.0), 0.6)
    assert asked == [0.5, 0.7]
    (kept, _) = sorted(
        tmp_path.glob("trial/*.json"), key=lambda p: json.loads(p.read_text())["new"]
    )
    assert json.loads(kept.read_text()) == {"new": 0.5, "plain": 1.0, "gains": True}
    kept.write_text("{}\n")  # broken: measured anew
    assert not is_faster("trial", ["a"], measure(2.0, 1.0), 0.6)

    folder = next(tmp_path.glob("trial"))
    folder.rename(tmp_path / "kept")
    folder.write_text("in the way")
    before = torch.get_rng_state()
    assert is_faster("trial", ["c"], lambda: (float(torch.rand(())) / 2, 1.0), 0.6)
    assert torch.equal(torch.get_rng_state(), before)
    assert "cannot keep which way is faster" in caplog.text


def test_the_first_of_two_processes_decides(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTACK_PLANE_CACHE", str(tmp_path))

    def measure():
        assert is_faster("trial", [], lambda: (0.5, 1.0), 0.6)  # the other one, meanwhile
        return 0.9, 1.0

    assert is_faster("trial", [], measure, 0.6)
    assert is_faster("trial", [], lambda: (0.9, 1.0), 0.6)


@pytest.mark.parametrize("faster", [False, True])
def test_a_model_computes_the_same_by_either_library(tiny_folders, monkeypatch, used, faster):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(core.products, "_onednn_is_faster", lambda: faster)
    loaded = load(str(tiny_folders["qwen2"]), "cpu")
    monkeypatch.setattr(core.products, "_onednn_is_faster", lambda: False)
    plain = load(str(tiny_folders["qwen2"]), "cpu")
    slot = slot_of(loaded)
    suffix = torch.tensor(slot.initial_ids)
    found = [TargetLoss(m, slot).token_gradient(suffix) for m in (loaded, plain)]
    assert bool(used) is faster
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4)
    gradients = []
    for m in (loaded, plain):
        tuned = get_peft_model(m.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        tuned.load_state_dict(
            {n: p.fill_(0.01) for n, p in tuned.state_dict().items() if "lora" in n}, strict=False
        )
        tuned(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.square().sum().backward()
        gradients.append([p.grad for p in tuned.parameters() if p.requires_grad])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for ours, own in zip(*gradients, strict=True):
        assert torch.allclose(ours, own, rtol=1e-3, atol=1e-4)


def test_a_second_derivative_is_torchs_own(used):
    weight, input = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
    seconds = []
    for product in (linear, nn.functional.linear):
        (first,) = torch.autograd.grad(
            product(input, weight).pow(3).sum(), input, create_graph=True
        )
        seconds.append(torch.autograd.grad(first.sum(), input)[0])
    assert used and torch.allclose(*seconds, rtol=1e-4, atol=1e-4)


def test_weights_in_onednns_layout_give_the_same_and_are_dropped(used, monkeypatch):
    monkeypatch.setattr(core.products, "_onednn_is_faster", lambda: True)
    model = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 8, bias=False))
    use_faster_products(model.requires_grad_(False))
    input = torch.randn(16, 40)
    plain = model(input)
    with pytest.raises(ValueError, match="stopped"), packed(model, 16):
        assert model[0].packed.is_mkldnn or model[0].packed is not model[0].weight
        assert torch.allclose(model(input), plain, atol=1e-6)
        assert torch.allclose(model(input[:3]), plain[:3], atol=1e-6)  # other counts too
        held = model[0].packed
        with packed(model, 16):
            assert model[0].packed is held
        assert model[0].packed is held  # the inner one drops what it made only
        raise ValueError("stopped")
    assert model[0].packed is model[2].packed is None
    monkeypatch.setattr(core.products, "memory_budget", lambda device: 4 * 24 * 40)
    with packed(model, 16):
        assert model[0].packed is None
