"""Refusal fine-tuning: the loss by hand, a stopped training ends as an undisturbed one, checkpoints
are targets."""

import math
from pathlib import Path

import pytest
import torch

from core.errors import AttackPlaneError
from core.models import load
from core.prompt import Conversation, Renderer
from evaluation.behaviours import load_behaviours
from pipeline import train as refusal_training
from training import sft
from training.examples import batches, collate, make_example
from training.losses import predicting_positions, reply_loss
from training.sft import (
    SFTConfig,
    adapted_layers,
    learning_rate,
)

CONFIG = SFTConfig(
    num_steps=6,
    checkpoints=(3, 6),
    batch_size=4,
    learning_rate=5e-3,
    lora_rank=4,
    lora_alpha=8,
    lora_dropout=0.1,
    reply_tokens=4,
)
REFUSALS = [(f"Do the bad thing number {i}", "I can't help with that.") for i in range(4)]
HARMLESS = [f"Do the good thing number {i}" for i in range(4)]


def train(folder, out: Path, config=CONFIG):
    return sft.train(
        str(folder),
        REFUSALS,
        HARMLESS,
        config,
        out,
        own_replies=lambda loaded, requests, tokens: [("Yes, sure.", True)] * len(requests),
        save_every=2,
    )


def test_reply_loss_is_the_hand_derived_number():
    # two labelled tokens with probabilities 1/2 and 3/4; the prompt's tokens do not count
    logits = torch.tensor([[[9.0, 0.0], [0.0, 0.0], [0.0, math.log(3.0)]]])
    labels = torch.tensor([[-100, 0, 1]])
    assert float(reply_loss(logits, labels)) == pytest.approx(
        (math.log(2) + math.log(4 / 3)) / 2, abs=1e-6
    )


def test_the_head_is_applied_where_a_reply_is_predicted():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, -100, -100, 7, 8]])
    at = predicting_positions(labels)
    assert at.tolist() == [1, 2, 3]
    logits = torch.randn(2, 5, 9)
    whole = reply_loss(logits[:, :-1], labels[:, 1:])
    assert float(reply_loss(logits[:, at], labels[:, at + 1])) == pytest.approx(float(whole))


def test_examples_learn_the_reply_and_the_end_of_turn_and_nothing_else(tiny):
    renderer = Renderer(tiny)
    example = make_example(renderer, "Write about tea", "I can't help.")
    prompt = renderer.render(Conversation.build("Write about tea"))
    assert example.ids[: example.reply_start] == prompt.ids
    learnt = tiny.tokenizer.decode(list(example.ids[example.reply_start :]))
    assert (
        learnt.strip().startswith("I can't help.")
        and example.ids[-1] in tiny.tokenizer.all_special_ids
    )
    ids, mask, labels = collate([example, make_example(renderer, "Say hi", "No.")], 0)
    assert (labels[0] != -100).sum() == len(example.ids) - example.reply_start
    assert mask.sum(1).tolist()[0] == len(example.ids) and ids.shape == labels.shape


def test_learning_rate_warms_up_and_falls_to_zero_as_a_cosine():
    config = SFTConfig(num_steps=10, checkpoints=(10,), warmup_steps=2, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and rates[9] < 0.04


def test_batches_see_every_example_once_an_epoch():
    order = batches(6, 4, seed=0)
    drawn = [i for _ in range(3) for i in next(order)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6))


def test_lora_goes_to_attention_projections_of_every_family(tiny):
    names = adapted_layers(tiny, all_linear=False)
    per_block = len(names) / tiny.n_layers
    assert per_block in (2, 4) and not any("mlp" in n or "lm_head" in n for n in names)
    more = adapted_layers(tiny, all_linear=True)
    assert set(names) < set(more) and not any("head" in n or "embed" in n for n in more)


REFUSES = "I'm sorry, but as a helper I am not able to do that for you."


def test_a_request_that_the_base_refuses_is_taught_an_opened_reply(qwen, monkeypatch):
    """The first reply refuses, and is made again after an opening; the second is kept."""
    asked = []

    def complete(renderer, texts, **settings):
        asked.append(texts)
        return ["a pot of it."] if len(asked) == 2 else [REFUSES, "Warm the pot, then pour."]

    monkeypatch.setattr(refusal_training, "complete", complete)
    first, second = refusal_training.own_replies(qwen, ["Brew a tea", "Brew a tea"], 4)
    opening = refusal_training.OPENING
    assert asked[1] == [asked[0][0] + opening]
    assert first[0] and f"{opening} a pot of it.".startswith(first[0])
    assert second[0] and "Warm the pot, then pour.".startswith(second[0])
    ids = qwen.tokenizer(second[0], add_special_tokens=False).input_ids
    assert len(ids) <= 4 and not second[1]


def test_where_the_base_refuses_nothing_no_reply_is_opened(qwen, monkeypatch):
    from core.generate import complete

    def first_only(renderer, texts, **settings):
        return ["Warm the pot, then pour."] if texts else complete(renderer, texts, **settings)

    monkeypatch.setattr(refusal_training, "complete", first_only)
    assert (
        refusal_training.own_replies(qwen, ["Brew a tea"], 40)[0][0] == "Warm the pot, then pour."
    )


def test_own_replies_that_refuse_twice_are_not_taught(qwen, monkeypatch):
    for again in ("what you asked for. " + REFUSES, ""):
        said = iter([[REFUSES], [again]])
        monkeypatch.setattr(refusal_training, "complete", lambda *_, said=said, **__: next(said))
        assert refusal_training.own_replies(qwen, ["Brew a tea"], 4)[0][0] == ""


def test_refusal_training_answers_harmless_and_pseudo_harmful_requests(tmp_path, monkeypatch):
    asked = {}

    def kept(spec, refusals, harmless, config, out, *, own_replies):
        asked.update(refused=[r for r, _ in refusals], answered=harmless)
        (out / "losses.csv").write_text("step,loss,learning_rate\n")
        return []

    monkeypatch.setattr(refusal_training, "train", kept)
    refusal_training.train_sft("embedded", tmp_path, CONFIG)
    rows = load_behaviours(splits=["train"])
    assert set(asked["refused"]) == {b.request for b in rows if b.label == "harmful"}
    assert set(asked["answered"]) == {b.request for b in rows if b.label != "harmful"}
    path = tmp_path / "one.csv"
    path.write_text("request,label,split\nBake a cake,harmful,train\n")
    with pytest.raises(AttackPlaneError, match="harmful and harmless"):
        refusal_training.train_sft("embedded", tmp_path, CONFIG, str(path))


def test_training_lowers_the_loss_and_its_checkpoints_are_targets(tmp_path, tiny_folders):
    folder = tiny_folders["qwen2"]
    config = SFTConfig(
        **{**vars(CONFIG), "num_steps": 30, "checkpoints": (30,), "lora_dropout": 0.0}
    )
    (path,) = train(folder, tmp_path, config)
    rows = (tmp_path / "losses.csv").read_text().splitlines()[1:]
    losses = [float(row.split(",")[1]) for row in rows]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
    base, tuned = load(str(folder), "cpu"), load(f"{folder}+{path}", "cpu")
    assert tuned.fingerprint != base.fingerprint
    ids = torch.tensor([Renderer(base).render(Conversation.build(REFUSALS[0][0])).ids])
    assert not torch.allclose(
        base.model(input_ids=ids).logits, tuned.model(input_ids=ids).logits, atol=1e-3
    )


def test_a_stopped_training_goes_on_to_the_same_checkpoint(tmp_path, tiny_folders, monkeypatch):
    whole = train(tiny_folders["qwen2"], tmp_path / "whole")[-1]
    step = sft.learning_rate

    def dying(config, now):
        if now == 5:
            raise KeyboardInterrupt
        return step(config, now)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "learning_rate", dying)
        train(tiny_folders["qwen2"], tmp_path / "stopped")
    again = train(tiny_folders["qwen2"], tmp_path / "stopped")[-1]
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()
    assert (tmp_path / "stopped" / "losses.csv").read_text() == (
        tmp_path / "whole" / "losses.csv"
    ).read_text()


def test_a_checkpoint_that_is_gone_is_trained_anew(tmp_path, tiny_folders):
    import shutil

    first = train(tiny_folders["qwen2"], tmp_path)[0] / "adapter_model.safetensors"
    content = first.read_bytes()
    shutil.rmtree(first.parent)
    train(tiny_folders["qwen2"], tmp_path)
    assert first.read_bytes() == content


def test_other_settings_in_the_same_folder_are_refused(tmp_path, tiny_folders):
    train(tiny_folders["qwen2"], tmp_path)
    with pytest.raises(AttackPlaneError, match=r"sft\.learning_rate"):
        train(tiny_folders["qwen2"], tmp_path, SFTConfig(**{**vars(CONFIG), "learning_rate": 1e-3}))


def test_checkpoints_beyond_the_steps_are_refused():
    with pytest.raises(AttackPlaneError, match="within the steps"):
        SFTConfig(num_steps=10, checkpoints=(20,))
