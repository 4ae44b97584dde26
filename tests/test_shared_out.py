"""Models whose parts lie on the CPU and on disk: what they give is what the whole model gives."""

import pytest
import torch

import core.decoding
from attacks.gcg import GCGConfig
from attacks.objective import TargetLoss
from attacks.slot import default_slot
from core.errors import AttackPlaneError
from core.generate import complete
from core.models import ModelHandle, blocks_of, load
from core.prompt import Conversation, Renderer
from core.specs import parse_spec
from geometry.activations import collect
from pipeline.attack_in_memory import run_attack
from training.loop import refuse_adapter

REQUESTS = ["Bake a cake", "Name three rivers", "Why is the sky blue at noon?"]


def shared_out(folder):
    """A model whose second half, its head and its embedding lie on disk."""
    whole = load(str(folder))
    names = {id(module): name for name, module in whole.model.named_modules()}
    blocks = [names[id(block)] for block in blocks_of(whole.model, str(folder))]
    places = {}
    for name, module in whole.model.named_modules():
        if name and not list(module.children()) and not name.startswith(tuple(blocks)):
            places[name] = "cpu"
    places |= {name: "cpu" if n < len(blocks) // 2 else "disk" for n, name in enumerate(blocks)}
    return whole, load(str(folder), places)


@pytest.fixture(params=["llama", "qwen2", "gemma3"], scope="module")
def both(request, tiny_folders):
    return shared_out(tiny_folders[request.param])


def test_it_is_known_as_shared_out_and_has_the_models_fingerprint(both):
    whole, parts = both
    assert parts.offloaded and parts.shared_out and not parts.side_by_side
    assert not whole.shared_out and parts.fingerprint == whole.fingerprint
    assert parts.device == torch.device("cpu")


def test_replies_are_the_whole_models(both, monkeypatch):
    monkeypatch.setattr(core.decoding, "ENOUGH", 3)
    monkeypatch.setattr(core.decoding, "uses_onednn", lambda model: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    texts = []
    for loaded in both:
        renderer = Renderer(loaded)
        prompts = [renderer.text(Conversation.build(r)) for r in REQUESTS]
        texts.append(complete(renderer, prompts, max_new_tokens=6))
    assert texts[0] == texts[1]


def test_activations_are_the_whole_models(both):
    found = []
    for loaded in both:
        renderer = Renderer(loaded)
        prompts = [renderer.render(Conversation.build(r)) for r in REQUESTS]
        found.append(collect(loaded, prompts, REQUESTS).resid)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_gradients_and_losses_of_gcg_are_the_whole_models(both):
    found = []
    for loaded in both:
        options = {"length": 5, "placement": "{request} {suffix}", "system": None}
        slot = default_slot(Renderer(loaded), REQUESTS[0], "Sure, here is", **options)
        loss, suffix = TargetLoss(loaded, slot), torch.tensor(slot.initial_ids)
        many = suffix.repeat(6, 1)
        many[torch.arange(5), torch.arange(5)] += 1
        loss.share(suffix)
        found.append((loss.token_gradient(suffix), loss.losses(many)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_a_search_finds_the_whole_models_suffix(both):
    config = GCGConfig(num_steps=2, search_width=8, topk=8, suffix_length=4)
    suffixes = [
        run_attack("gcg", REQUESTS[0], "Sure", source=loaded, config=config)[0].suffix
        for loaded in both
    ]
    assert suffixes[0] == suffixes[1]


def test_what_cannot_be_shared_out_says_so(tiny_folders, tmp_path):
    assert parse_spec(f"{tiny_folders['llama']}?device_map=auto").device_map == "auto"
    with pytest.raises(AttackPlaneError, match="unknown option"):
        parse_spec(f"{tiny_folders['llama']}?device_map=everywhere")
    with pytest.raises(AttackPlaneError, match="accelerate launch"):
        refuse_adapter(f"{tiny_folders['llama']}?device_map=auto")


def test_auto_loads_on_this_machine(tiny_folders):
    handle = ModelHandle(f"{tiny_folders['llama']}?device_map=auto")
    assert handle.fingerprint == ModelHandle(str(tiny_folders["llama"])).fingerprint
    assert handle.loaded.device.type in ("cpu", "cuda")
