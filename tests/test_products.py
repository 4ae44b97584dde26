"""Products by oneDNN: torch's own values and gradients, and only where they may stand in."""

import json

import pytest
import torch
from torch import nn

import core.measured
import core.products
from core.measured import is_faster
from core.products import FrozenLinear, linear, use_faster_products

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def used(monkeypatch):
    """How many products oneDNN computed."""
    calls = []
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

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(core.measured, "write_atomically", full)
    assert is_faster("trial", ["c"], measure(0.5, 1.0), 0.6) and "no space" in caplog.text
