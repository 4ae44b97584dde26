"""CAST: the hook by hand, its fit, and that it is a target like any other."""

import json
import math
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from attacks.objective import TargetLoss
from attacks.slot import Slot
from cli import cli
from core.cast import Cast, load_cast, similarity
from core.continuations import Continuations
from core.errors import AttackPlaneError
from core.generate import complete
from core.models import load
from core.prefix import keeps_keys_and_values_only
from core.prompt import Conversation, Renderer
from geometry.activations import collect
from pipeline.train import train_arm
from tests.arms import behaviours_file
from training.cast import CASTConfig
from training.cast_fit import best_threshold, first_component, prompt_end
from training.devices import Devices
from training.registry import ARMS


def made(model, folder, *, threshold=-2.0, above=True, size=3.0):
    """A folder whose condition always holds (s > -2), and which adds one vector at layer 2."""
    d = model.d_model
    generator = torch.Generator().manual_seed(0)
    end = prompt_end(Renderer(model), ["Write about tea", "Say hi now"])
    condition, behaviour = torch.randn(2, d, generator=generator)
    cast = Cast(condition, 1, threshold, above, size * behaviour[None], (2,), end)
    cast.save(folder)
    return cast


def test_cast_is_fitted_in_one_process(tmp_path, tiny_folders, monkeypatch):
    monkeypatch.setattr(Devices, "__init__", lambda self: setattr(self, "count", 2))
    requests = behaviours_file(tmp_path)
    with pytest.raises(AttackPlaneError, match="fitted in one process"):
        train_arm("cast", str(tiny_folders["qwen2"]), tmp_path / "out", None, str(requests))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cast"


def test_similarity_is_the_formula():
    h, c = torch.tensor([[1.0, 2.0]]), torch.tensor([2.0, 0.0])
    # (c c^T / c.c) h = (1, 0); tanh gives (0.7616, 0); its cosine with (1, 2) is 1 / sqrt(5)
    assert float(similarity(h, c)) == pytest.approx(1 / math.sqrt(5))


def test_the_first_component_of_pairs_points_towards_the_positive_side():
    direction = torch.tensor([0.6, -0.8, 0.0])
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(20, 3, generator=generator)
    found = first_component(shared + 5 * direction, shared)
    assert torch.allclose(found, direction, atol=1e-5)


def test_the_threshold_is_the_middle_of_the_widest_gap_with_the_highest_f1():
    scores = torch.tensor([0.1, 0.2, 0.6, 0.7])
    harmful = torch.tensor([True, True, False, False])
    threshold, above, f1 = best_threshold(scores, harmful)
    assert threshold == pytest.approx(0.4) and not above and f1 == 1


def test_the_hook_adds_its_vector_where_the_condition_holds_and_nothing_elsewhere(
    tiny_folders, folder
):
    base = load(str(tiny_folders["qwen2"]), "cpu")
    cast = made(base, folder)
    steered = load(f"{tiny_folders['qwen2']}+{folder}", "cpu")
    prompts = [Renderer(base).render(Conversation.build(t)) for t in ("Write about tea", "Go on")]
    ids = ["a", "b"]
    plain, moved = (collect(m, prompts, ids).resid for m in (base, steered))
    assert torch.allclose(plain[:, :2], moved[:, :2], atol=1e-5)
    at = moved[:, 2] - plain[:, 2]
    assert torch.allclose(at, cast.behaviour[0].expand_as(at), atol=1e-4)
    made(base, folder, threshold=2.0)  # s > 2 never holds
    never = load(f"{tiny_folders['qwen2']}+{folder}", "cpu")
    assert torch.allclose(collect(never, prompts, ids).resid, plain, atol=1e-5)
    assert "hook at inference time, not weights" in steered.describe() and base.hook is None


def test_the_condition_reads_the_mean_over_the_prompts_tokens_only(tiny_folders, folder):
    base = load(str(tiny_folders["llama"]), "cpu")
    renderer = Renderer(base)
    prompt = renderer.render(Conversation.build("Write about tea"), "Sure, here it is, dear all")
    states = collect(base, [renderer.render(Conversation.build("Write about tea"))], ["a"])
    assert states.resid.shape[1] == base.n_layers + 1
    ids = torch.tensor([prompt.ids])
    hidden = base.decoder(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    cast = made(base, folder)
    s = float(similarity(hidden.mean(0), cast.condition))
    whole = torch.tensor([[*prompt.ids, *prompt.target_ids]])
    table = base.model.get_input_embeddings()
    for below, met in ((s - 1e-4, True), (s + 1e-4, False)):
        made(base, folder, threshold=below)
        steered = load(f"{tiny_folders['llama']}+{folder}", "cpu").model
        plain = base.model(input_ids=whole).logits
        for inputs in ({"input_ids": whole}, {"inputs_embeds": table(whole)}):
            assert torch.allclose(steered(**inputs).logits, plain, atol=1e-4) != met
        padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), whole], 1)
        mask = torch.tensor([[0] * 5 + [1] * whole.shape[1]])
        position = (mask.cumsum(1) - 1).clamp_min(0)
        out = steered(input_ids=padded, attention_mask=mask, position_ids=position).logits[:, 5:]
        assert torch.allclose(out, plain, atol=1e-3) != met


def test_replies_losses_and_continuations_agree_with_whole_passes(tiny_folders, folder):
    """Prefix caches and packed passes do not see whole prompts: none of them is used."""
    base = load(str(tiny_folders["qwen2"]), "cpu")
    made(base, folder)
    steered = load(f"{tiny_folders['qwen2']}+{folder}", "cpu")
    assert not keeps_keys_and_values_only(steered)
    renderer = Renderer(steered)
    prompt = renderer.render(Conversation.build("Write about tea x x x"), "Sure, here")
    span = prompt.content
    slot = Slot(
        prompt.ids[: span.stop - 3],
        prompt.ids[span.stop - 3 : span.stop],
        prompt.ids[span.stop :],
        prompt.target_ids,
    )
    loss = TargetLoss(steered, slot)
    assert loss.path == "plain"
    whole = torch.tensor([[*prompt.ids, *prompt.target_ids]])
    n = len(prompt.target_ids)
    log_p = steered.model(input_ids=whole).logits[0, -n - 1 : -1].log_softmax(-1)
    plain = log_p[torch.arange(n), list(prompt.target_ids)]
    suffix = torch.tensor(slot.initial_ids)
    assert float(loss.losses(suffix[None])[0]) == pytest.approx(-float(plain.mean()), abs=1e-4)
    value, gradient = loss.token_gradient(suffix)
    assert value == pytest.approx(-float(plain.mean()), abs=1e-4) and gradient.abs().sum() > 0
    table = Continuations(steered, [prompt.ids]).log_probabilities([prompt.target_ids])
    assert float(table[0, 0]) == pytest.approx(float(plain.mean()), abs=1e-4)
    # greedy decoding with a cache, against decoding by whole passes
    texts = [renderer.text(Conversation.build(t)) for t in ("Write about tea", "Go on then")]
    got = complete(renderer, texts, max_new_tokens=4)
    for text, reply in zip(texts, got, strict=True):
        ids = renderer.tokenise([text])[0]
        for _ in range(4):
            ids.append(int(steered.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        made_by_hand = steered.tokenizer.decode(ids[-4:], skip_special_tokens=True).strip()
        assert reply == made_by_hand


def test_a_pass_that_would_mix_rows_is_refused(tiny_folders, folder):
    base = load(str(tiny_folders["qwen2"]), "cpu")
    made(base, folder)
    steered = load(f"{tiny_folders['qwen2']}+{folder}", "cpu")
    out = steered.model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True)
    cache = out.past_key_values
    cache.batch_repeat_interleave(2)
    with pytest.raises(AttackPlaneError, match="other rows"):
        steered.model(input_ids=torch.tensor([[4], [5]]), past_key_values=cache)


def test_cast_is_fitted_attacked_and_replayed_like_any_target(tmp_path, tiny_folders):
    model, path = tiny_folders["qwen2"], behaviours_file(tmp_path)
    config = ARMS.get("cast").make_config({"reply_tokens": 4}, preset="small")
    result = train_arm("cast", str(model), tmp_path / "out", config, str(path))
    spec = f"{model}+{result.checkpoints[0]}"
    assert "not weights" in result.note and all(path.is_file() for path in result.files)
    cast = load_cast(result.checkpoints[0])
    assert cast.layers == (1, 2) and cast.condition_layer == 1 and cast.prompt_end
    card = json.loads((result.checkpoints[0] / "attack_plane.json").read_text())
    assert card["arm"] == "cast" and len(card["trained_on"]) == 12  # validation too
    options = ["--steps", "1", "--width", "4", "--limit", "1", "--behaviours", str(path)]
    run = ["--run", str(tmp_path / "run")]
    for arguments in (
        ["gcg", "--model", spec, *run, *options],
        ["transfer", *run, "--target", spec, "--judge", "rules", "--max-new-tokens", "4"],
    ):
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
    again = train_arm("cast", str(model), tmp_path / "again", config, str(path))
    assert (
        load(spec, "cpu").fingerprint == load(f"{model}+{again.checkpoints[0]}", "cpu").fingerprint
    )


def test_broken_and_foreign_folders_are_refused(tiny_folders, folder):
    base = load(str(tiny_folders["qwen2"]), "cpu")
    made(base, folder)
    with pytest.raises(AttackPlaneError, match="another model"):
        load(f"{tiny_folders['gpt2']}+{folder}", "cpu") if base.d_model != 32 else _wider(folder)
        load(f"{tiny_folders['qwen2']}+{folder}", "cpu")
    made(base, folder)
    replace(load_cast(folder), prompt_end=(10**9,)).save(folder)
    with pytest.raises(AttackPlaneError, match="tokens that this base has not"):
        load(f"{tiny_folders['qwen2']}+{folder}", "cpu")
    (folder / "cast.json").write_text("{}")
    with pytest.raises(AttackPlaneError, match="cannot read this CAST folder"):
        load(f"{tiny_folders['qwen2']}+{folder}", "cpu")
    assert CASTConfig().strength == 1.0


def _wider(folder):
    cast = load_cast(folder)
    Cast(torch.ones(33), 1, cast.threshold, True, torch.zeros(1, 33), (2,), cast.prompt_end).save(
        folder
    )
