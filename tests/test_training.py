"""Training: every arm moves what it is meant to move, a stopped one ends as an undisturbed one, and
checkpoints are targets."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from attacks.objective import TargetLoss
from attacks.slot import Slot
from cli import cli
from core.errors import AttackPlaneError
from core.models import ModelHandle, load
from core.prompt import Conversation, Renderer
from core.records import HARMFUL, HARMLESS, PSEUDO_HARMFUL
from core.store import RunFolder
from evaluation.behaviours import load_behaviours
from evaluation.usability import request_hash
from pipeline.train import train_arm
from tests.arms import TRAINED, behaviours_file, config_of
from training import data
from training.adapter import Adapted, Dropout, adapted_layers
from training.config import TrainConfig, differences
from training.devices import Devices
from training.examples import Order, make_example
from training.forward import Forward
from training.loop import Run, seeded
from training.losses import reply_loss
from training.registry import ARMS
from training.requests import requests_of
from training.states import units

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def requests_file(tmp_path):
    return behaviours_file(tmp_path)


def trained(name, folder, out, requests, **values):
    """The result of a short training."""
    return train_arm(name, str(folder), out, config_of(name, **values), str(requests), save_every=2)


def opened(name, folder, out, requests, **values):
    """A training that has not begun, to look inside."""
    arm = ARMS.get(name)
    wanted = requests_of(str(requests), arm.needs)
    with RunFolder(out) as run_folder, seeded(0):
        handle = ModelHandle(str(folder))
        return Run(arm, handle, wanted, config_of(name, **values), run_folder, Devices())


# --- examples and settings ------------------------------------------------------------------------
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
    assert example.t_inst == prompt.t_inst and example.t_post_inst == prompt.t_post_inst


def test_learning_rate_warms_up_and_falls_by_its_schedule():
    config = TrainConfig(num_steps=10, warmup_steps=2, learning_rate=1.0)
    rates = [config.rate(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and rates[9] < 0.04
    linear = TrainConfig(num_steps=10, warmup_steps=2, learning_rate=1.0, schedule="linear")
    assert linear.rate(4) == pytest.approx(0.75)
    constant = TrainConfig(num_steps=10, learning_rate=1.0, schedule="constant")
    assert constant.rate(9) == 1.0


def test_batches_see_every_example_once_an_epoch_in_any_order_of_asking():
    order = Order(6, 4, seed=0)
    third, first = order.batch(2), order.batch(0)
    drawn = [*first, *order.batch(1), *third]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6))


def test_checkpoints_beyond_the_steps_are_refused_and_the_last_step_is_saved():
    with pytest.raises(AttackPlaneError, match="within the steps"):
        TrainConfig(num_steps=10, checkpoints=(20,))
    assert TrainConfig(num_steps=10, checkpoints=(4,)).saved_steps == (4, 10)


def test_the_help_lists_every_difference_of_the_small_preset():
    for name, arm in ARMS.all().items():
        paper, small = (arm.make_config({}, preset=preset) for preset in ("paper", "small"))
        text = CliRunner().invoke(cli, ["train", name, "--help"]).output
        listed = text.split("(paper -> small):")[1].split("Options:")[0]
        assert len(listed.strip().splitlines()) == len(differences(small, paper)), name


# --- one forward pass -----------------------------------------------------------------------------
def test_packed_and_padded_batches_give_the_same_losses_and_gradients(qwen, tiny_folders):
    model = load(str(tiny_folders["qwen2"]), "cpu")
    renderer = Renderer(model)
    texts = [
        ("Write about tea", "No."),
        ("Say hi", "I can't help with that, sorry."),
        ("Go", "Yes"),
    ]
    rows = [make_example(renderer, *text) for text in texts]
    weight = model.blocks[0].mlp.down_proj.weight.requires_grad_(True)
    found = []
    for packed in (True, False):
        forward = Forward(model)
        forward.decide(rows)
        assert forward._packed is not None
        if not packed:
            forward._packed = None
        out = forward(rows, range(model.n_layers + 1))
        loss = reply_loss(*out.logits())
        (gradient,) = torch.autograd.grad(loss, weight)
        states = out.all_residuals([1, 3])
        mean = (states * out.weight[None, :, None]).sum(1) / out.weight.sum()
        at = out.residual(2, [2, 1], [rows[2].t_inst, rows[1].t_post_inst])
        found.append([loss.detach(), gradient, mean, at, out.response(1, [0, 1, 2])])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-3)


def test_a_model_that_cannot_be_packed_is_padded(tiny):
    renderer = Renderer(tiny)
    rows = [make_example(renderer, "Write about tea", "No."), make_example(renderer, "Hi", "Yes.")]
    forward = Forward(tiny)
    loss = reply_loss(*forward(rows).logits())
    plain = 0.0
    for row in rows:  # one by one, by the model itself
        logits = tiny.model(input_ids=torch.tensor([row.ids])).logits[0]
        start = row.reply_start
        nll = (
            -logits[start - 1 : -1]
            .log_softmax(-1)
            .gather(-1, torch.tensor(row.ids[start:])[:, None])
        )
        plain += float(nll.sum())
    count = sum(len(row.ids) - row.reply_start for row in rows)
    assert float(loss) == pytest.approx(plain / count, rel=1e-3)


# --- the loop -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TRAINED)
def test_a_stopped_training_goes_on_to_the_same_bits(
    name, tmp_path, tiny_folders, requests_file, monkeypatch
):
    whole = trained(name, tiny_folders["qwen2"], tmp_path / "whole", requests_file)
    own = Run._norm

    def dying(self, step, parts):
        if step == 4:  # gradients are there, and R2D2 has changed its pool
            raise KeyboardInterrupt
        return own(self, step, parts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_norm", dying)
        trained(name, tiny_folders["qwen2"], tmp_path / "stopped", requests_file)
    again = trained(name, tiny_folders["qwen2"], tmp_path / "stopped", requests_file)
    assert again.losses == whole.losses
    for one, other in zip(again.checkpoints, whole.checkpoints, strict=True):
        assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
        assert (one / "attack_plane.json").read_text() == (other / "attack_plane.json").read_text()
    tables = [tmp_path / run / "losses.csv" for run in ("whole", "stopped")]
    assert tables[0].read_text() == tables[1].read_text()


@pytest.mark.parametrize("name", TRAINED)
def test_checkpoints_are_targets_and_say_what_they_were_trained_on(
    name, tmp_path, tiny_folders, requests_file
):
    folder = tiny_folders["llama"]
    result = trained(name, folder, tmp_path / "out", requests_file, num_steps=3)
    path = result.checkpoints[-1]
    base, tuned = load(str(folder), "cpu"), load(f"{folder}+{path}", "cpu")
    assert tuned.fingerprint != base.fingerprint
    ids = torch.tensor([Renderer(base).render(Conversation.build("Do the bad thing")).ids])
    assert not torch.equal(base.model(input_ids=ids).logits, tuned.model(input_ids=ids).logits)
    card = json.loads((path / "attack_plane.json").read_text())
    assert card["arm"] == name and card["step"] == 3
    trains_on = {"harmful": "Do the bad thing number 0", "harmless": "do the good thing  number 1."}
    for label, request in trains_on.items():
        assert (request_hash(request) in card["trained_on"]) == (label in ARMS.get(name).needs)
    assert all(path.is_file() for path in result.files)


def test_accumulated_micro_batches_are_one_batch(tmp_path, tiny_folders, requests_file):
    one, two = (
        trained(  # a mean over pairs, however long their replies are
            "dpo",
            tiny_folders["qwen2"],
            tmp_path / str(n),
            requests_file,
            batch_size=4 // n,
            accumulation=n,
            num_steps=2,
            lora_dropout=0.0,
        )
        for n in (1, 4)
    )
    assert one.losses[1]["loss"] == pytest.approx(two.losses[1]["loss"], rel=1e-3)
    assert one.losses[0]["loss"] == pytest.approx(two.losses[0]["loss"], rel=1e-4)
    assert one.losses[0]["gradient_norm"] == pytest.approx(two.losses[0]["gradient_norm"], rel=1e-3)


def test_clipping_bounds_the_gradient_and_reports_its_own_norm(
    tmp_path, tiny_folders, requests_file
):
    run = opened("sft", tiny_folders["qwen2"], tmp_path, requests_file, max_norm=0.01)
    seen = []
    step = run.optimiser.step
    run.optimiser.step = lambda: (
        seen.append(torch.stack([p.grad.norm() for p in run.adapted.parameters]).norm()),
        step(),
    )
    row = run.update(0)
    assert float(seen[0]) <= 0.0101 and row["gradient_norm"] > 1


def test_a_loss_that_is_not_finite_saves_nothing(
    tmp_path, tiny_folders, requests_file, monkeypatch
):
    nothing = torch.tensor(math.nan, requires_grad=True)
    monkeypatch.setattr("training.losses.reply_loss", lambda *_: nothing)
    with pytest.raises(AttackPlaneError, match="not finite"):
        trained("refusal", tiny_folders["qwen2"], tmp_path / "out", requests_file)
    assert (
        not (tmp_path / "out" / "step-3").exists() and not (tmp_path / "out" / "state.pt").exists()
    )


def test_weights_that_are_not_finite_save_nothing(
    tmp_path, tiny_folders, requests_file, monkeypatch
):
    step = torch.optim.AdamW.step

    def broken(self, *args, **kwargs):
        step(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][-1].fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(AttackPlaneError, match="weights are not finite"):
        trained("refusal", tiny_folders["qwen2"], tmp_path / "out", requests_file)
    assert not list((tmp_path / "out").glob("step-*"))
    assert not (tmp_path / "out" / "state.pt").exists()


def test_a_checkpoint_that_is_gone_is_trained_anew(tmp_path, tiny_folders, requests_file):
    first = trained("sft", tiny_folders["qwen2"], tmp_path / "out", requests_file).checkpoints[0]
    content = (first / WEIGHTS).read_bytes()
    shutil.rmtree(first)
    trained("sft", tiny_folders["qwen2"], tmp_path / "out", requests_file)
    assert (first / WEIGHTS).read_bytes() == content


def test_a_folder_of_the_users_is_not_deleted(tmp_path, tiny_folders, requests_file):
    theirs = tmp_path / "out" / "step-3" / "notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(AttackPlaneError, match="nothing was written"):
        trained("sft", tiny_folders["qwen2"], tmp_path / "out", requests_file)
    assert theirs.read_text() == "mine" and not (tmp_path / "out" / "manifest.json").exists()


def test_another_arm_or_other_settings_in_the_same_folder_are_refused(
    tmp_path, tiny_folders, requests_file
):
    trained("sft", tiny_folders["qwen2"], tmp_path / "out", requests_file)
    with pytest.raises(AttackPlaneError, match=r"train\.learning_rate"):
        trained("sft", tiny_folders["qwen2"], tmp_path / "out", requests_file, learning_rate=1e-3)
    with pytest.raises(AttackPlaneError, match=r"train\.arm"):
        trained("refusal", tiny_folders["qwen2"], tmp_path / "out", requests_file)


def test_the_manifest_lists_every_difference_to_the_paper(tmp_path, tiny_folders, requests_file):
    trained("dpo", tiny_folders["qwen2"], tmp_path / "out", requests_file)
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["train"]
    changed = settings["differs_from_paper"]
    assert changed["learning_rate"] == [5e-5, 5e-3] and "beta" not in changed
    config = ARMS.get("dpo").make_config({})
    assert all(
        getattr(config, name) == pair[0] for name, pair in changed.items() if name != "checkpoints"
    )


def test_merged_weights_read_as_the_active_adapter_and_leave_the_base_to_the_bit(
    tmp_path, tiny_folders, requests_file
):
    run = opened("sft", tiny_folders["qwen2"], tmp_path, requests_file)
    model, ids = run.adapted.loaded.model, torch.tensor([[1, 5, 9, 30]])
    before = {k: v.clone() for k, v in model.named_parameters() if "lora" not in k}
    for step in range(2):
        run.update(step)
    with torch.no_grad():
        model.eval()
        active = model(input_ids=ids).logits
        with run.adapted.merged():
            merged = model(input_ids=ids).logits
        with run.adapted.merged(reduced=True):
            narrow = model(input_ids=ids).logits
        with run.adapted.off():
            off = model(input_ids=ids).logits
    assert torch.allclose(active, merged, atol=1e-4) and not torch.equal(active, off)
    assert 0 < (narrow - merged).abs().max() < 0.1 * merged.abs().max()
    assert all(torch.equal(before[k], v) for k, v in model.named_parameters() if k in before)
    assert torch.equal(off, load(str(tiny_folders["qwen2"]), "cpu").model(input_ids=ids).logits)


# --- what each arm moves --------------------------------------------------------------------------
def moved_by(name, tmp_path, folder, requests, updates=30, **values):
    """The mean losses of the first and of the last five updates, by component."""
    run = opened(name, folder, tmp_path / name, requests, num_steps=updates, **values)
    run.adapted.tuned.train()
    rows = [run.update(step) for step in range(updates)]
    ends = [{k: sum(r[k] for r in part) / 5 for k in rows[0]} for part in (rows[:5], rows[-5:])]
    return run, *ends


QUIET = {"lora_dropout": 0.0}


@pytest.mark.parametrize("name", ["refusal", "sft", "dpo"])
def test_the_loss_of_supervised_arms_falls(name, tmp_path, tiny_folders, requests_file):
    _, first, last = moved_by(name, tmp_path, tiny_folders["qwen2"], requests_file, **QUIET)
    assert last["loss"] < 0.7 * first["loss"]


def test_circuit_breakers_turn_harmful_states_and_hold_the_others(
    tmp_path, tiny_folders, requests_file
):
    faster = {"learning_rate": 2e-2, "lora_rank": 16, "relative": False, **QUIET}
    run, first, last = moved_by(
        "cb", tmp_path, tiny_folders["qwen2"], requests_file, updates=60, **faster
    )
    # the weights are 10 (1 - t / 120) and 10 t / 120: from 10 to 5, and from 0 to 5
    assert first["reroute"] > 9.5 and last["reroute"] / 5 < 0.6  # the mean cosine
    last_layer = max(int(name.split(".layers.")[1].split(".")[0]) for name in run.adapted.weights())
    assert last_layer == 1  # of three blocks the adapter reaches up to residual layer 2


def test_relative_distances_count_tenths_of_the_bases_own_lengths(
    tmp_path, tiny_folders, requests_file
):
    run = opened("cb", tiny_folders["qwen2"], tmp_path, requests_file)
    texts = run.requests.harmless
    rows = [make_example(Renderer(run.adapted.loaded), b.request, "Yes.") for b in texts]
    bench = types.SimpleNamespace(adapted=run.adapted, forward=Forward(run.adapted.loaded))
    layers = [1, 3]
    found = units(bench, rows, layers, relative=True)
    with run.adapted.off():
        states = Forward(run.adapted.loaded)(rows, layers).all_residuals(layers)
    lengths = states.norm(dim=-1).median(-1).values / 10
    assert torch.allclose(found[:, 0, 0], lengths) and found.shape == (2, 1, 1)
    assert torch.equal(units(bench, rows, layers, relative=False), torch.ones(2, 1, 1))


def test_repbend_moves_unsafe_states_further_than_safe_ones(tmp_path, tiny_folders, requests_file):
    _, first, last = moved_by(
        "repbend", tmp_path, tiny_folders["qwen2"], requests_file, learning_rate=2e-3, **QUIET
    )
    assert last["unsafe"] < first["unsafe"] <= 0
    assert -last["unsafe"] > 1.2 * last["safe"]


def test_harc_raises_the_cosine_of_harmful_states_and_keeps_its_directions_apart(
    tmp_path, tiny_folders, requests_file
):
    run, first, last = moved_by(
        "harc", tmp_path, tiny_folders["qwen2"], requests_file, kl_weight=1.0, **QUIET
    )
    assert last["prompt"] < 0.6 * first["prompt"] and last["response"] < first["response"]
    assert last["drift"] > 0  # estimated anew and blended
    assert not any(v.requires_grad for v in vars(run.method.losses.__self__.now).values())


@pytest.mark.parametrize(
    ("terms", "components"),
    [
        ("prompt", {"ce", "prompt", "kl"}),
        ("response", {"ce", "response", "kl"}),
        ("ce_kl", {"ce", "kl"}),
        ("ce", {"ce"}),
    ],
)
def test_ablations_of_harc_leave_terms_out(
    terms, components, tmp_path, tiny_folders, requests_file
):
    run = opened("harc", tiny_folders["qwen2"], tmp_path, requests_file, terms=terms)
    logged = {"step", "loss", "drift", "gradient_norm", "learning_rate"}
    assert set(run.update(0)) - logged == components


def test_harcs_controls_are_other_directions_and_random_ones_stay(
    tmp_path, tiny_folders, requests_file
):
    found, layers = {}, {}
    for kind in ("harc", "permuted", "random"):
        run = opened("harc", tiny_folders["qwen2"], tmp_path / kind, requests_file, directions=kind)
        method = run.method.losses.__self__
        found[kind] = method.base.harm[2]
        assert float(found[kind].norm()) == pytest.approx(1, abs=1e-4)
        layers[kind] = method.layers
        run.update(0), run.update(1)
        assert torch.equal(method.now.harm, method.base.harm) == (kind == "random")
    assert abs(float(found["harc"] @ found["permuted"])) < 0.99
    assert abs(float(found["harc"] @ found["random"])) < 0.9
    assert layers["harc"] == layers["permuted"] == layers["random"]


def test_one_position_of_harc_reads_that_position_alone(tmp_path, tiny_folders, requests_file):
    values = {}
    for positions in ("both", "t_inst", "t_post_inst"):
        run = opened(
            "harc", tiny_folders["qwen2"], tmp_path / positions, requests_file, positions=positions
        )
        values[positions] = run.update(0)["prompt"]
    assert values["both"] == pytest.approx(values["t_inst"] + values["t_post_inst"], rel=1e-4)


# --- R2D2 -----------------------------------------------------------------------------------------
def test_r2d2_attacks_the_model_as_it_is_now(tmp_path, tiny_folders, requests_file):
    """The loss that a case records is that of the tuned model, not of the base."""
    run = opened("r2d2", tiny_folders["qwen2"], tmp_path, requests_file, **QUIET)
    pool = run.method.losses.__self__.pool
    for step in range(3):
        run.update(step)
    number = pool.drawn(3, 1)[0]
    with run.adapted.merged():
        pool.attack(number, 3, run.method.losses.__self__.gcg)
        case, slot = pool.cases[number], pool.slot(pool.cases[number])
        whole = (*slot.before_ids, *case.suffix, *slot.after_ids, *slot.target_ids)
        logits = run.adapted.loaded.model(input_ids=torch.tensor([whole])).logits[0]
        here = Slot(slot.before_ids, tuple(case.suffix), slot.after_ids, slot.target_ids)
        again = float(TargetLoss(run.adapted.loaded, here).losses(torch.tensor([case.suffix]))[0])
    n = len(slot.target_ids)
    plain = -logits[-n - 1 : -1].log_softmax(-1)[torch.arange(n), list(slot.target_ids)].mean()
    assert case.loss == pytest.approx(float(plain), abs=2e-3) and case.loss == pytest.approx(again)
    base = load(str(tiny_folders["qwen2"]), "cpu").model(input_ids=torch.tensor([whole])).logits[0]
    old = -base[-n - 1 : -1].log_softmax(-1)[torch.arange(n), list(slot.target_ids)].mean()
    assert abs(case.loss - float(old)) > 0.05


def test_r2d2_keeps_suffixes_between_updates_and_renews_a_share(
    tmp_path, tiny_folders, requests_file
):
    run = opened("r2d2", tiny_folders["qwen2"], tmp_path, requests_file, reset_every=3)
    pool = run.method.losses.__self__.pool
    new = [list(case.suffix) for case in pool.cases]
    run.update(0)
    drawn = pool.drawn(0, 2)
    assert [i for i in range(4) if pool.cases[i].suffix != new[i]] == sorted(drawn)
    kept = [list(case.suffix) for case in pool.cases]
    run.update(1)
    untouched = set(range(4)) - set(pool.drawn(1, 2))
    assert all(pool.cases[i].suffix == kept[i] for i in untouched)
    assert run.losses[-1]["pool_loss"] > 0 and 0 <= run.losses[-1]["pool_likely"] <= 1
    run.update(2)  # half of the pool begins anew
    assert sum(case.loss is None for case in pool.cases) >= 2


def test_r2d2_lowers_the_target_and_raises_the_refusal(tmp_path, tiny_folders, requests_file):
    _, first, last = moved_by("r2d2", tmp_path, tiny_folders["qwen2"], requests_file, **QUIET)
    assert last["toward"] < 0.7 * first["toward"]


def test_r2d2_refuses_to_draw_more_cases_than_it_has(tmp_path, tiny_folders, requests_file):
    with pytest.raises(AttackPlaneError, match="more test cases"):
        opened("r2d2", tiny_folders["qwen2"], tmp_path, requests_file, pool=1, cases=2)


# --- data -----------------------------------------------------------------------------------------
def test_arms_take_the_training_split_and_no_other():
    needs = (HARMFUL, HARMLESS, PSEUDO_HARMFUL)
    requests = requests_of("demonstration", needs)
    rows = load_behaviours(splits=["train"])
    for label in needs:
        assert [b.request for b in getattr(requests, label)] == [
            b.request for b in rows if b.label == label
        ]
    assert {b.split for b in requests.validation} == {"validation"}


def test_a_set_without_what_the_arm_needs_is_refused(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("request,label,split\nBake a cake,harmful,train\n")
    with pytest.raises(AttackPlaneError, match="harmless requests"):
        requests_of(str(path), (HARMFUL, HARMLESS))


def test_replies_of_a_file_take_the_place_of_the_bases_own(tmp_path, tiny_folders, requests_file):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"request": "Brew a tea", "reply": "Warm the pot."}\n')
    requests = requests_of(str(requests_file), (HARMLESS, PSEUDO_HARMFUL), str(path))
    assert [b.request for b in requests.harmless] == ["Brew a tea"] and not requests.pseudo_harmful
    model = load(str(tiny_folders["qwen2"]), "cpu")
    with RunFolder(tmp_path / "run") as folder:
        texts = data.Texts(model, requests, folder, reply_tokens=4, max_tokens=512)
        (example,) = texts.ordinary()
    assert "Warm the pot." in model.tokenizer.decode(list(example.ids))
    path.write_text('{"request": "Brew a tea"}\n')
    with pytest.raises(AttackPlaneError, match="row 1"):
        requests_of(str(requests_file), (HARMLESS,), str(path))


def test_ordinary_requests_are_held_with_the_opening_of_harmful_replies_too(
    tmp_path, tiny_folders, requests_file, monkeypatch
):
    """Else an arm takes the opening for the mark of harm. Given replies need no other."""
    monkeypatch.setattr(data, "complete", lambda _, texts, **__: ["a pot."] * len(texts))
    model = load(str(tiny_folders["qwen2"]), "cpu")
    requests = requests_of(str(requests_file), (HARMLESS, PSEUDO_HARMFUL))
    with RunFolder(tmp_path / "run") as folder:
        texts = data.Texts(model, requests, folder, reply_tokens=40, max_tokens=512)
        examples = texts.ordinary(opened=True)[len(texts.ordinary()) :]
    asked = [b.request for b in (*requests.harmless, *requests.pseudo_harmful)]
    assert asked and len(examples) == len(asked)
    for request, example in zip(asked, examples, strict=True):
        text = model.tokenizer.decode(list(example.ids))
        assert request in text and f"{data.OPENING} a pot." in text
    given = dataclasses.replace(requests, replies=dict.fromkeys(asked, "Warm the pot."))
    with RunFolder(tmp_path / "given") as folder:
        texts = data.Texts(model, given, folder, reply_tokens=40, max_tokens=512)
        assert len(texts.ordinary(opened=True)) == len(texts.ordinary()) == len(asked)


def test_a_reply_that_turns_to_a_refusal_after_what_is_learnt_is_no_continuation(qwen, monkeypatch):
    """It is judged whole, and cut only then."""
    turns = "a pot. Fill it up. I'm sorry, but I cannot help you with any of that."
    monkeypatch.setattr(data, "complete", lambda *_, **__: [turns, "a pot. Fill it up to here."])
    made = data.continued(qwen, ["one", "two"], ["Sure, here is"] * 2, 4)
    assert made[0][0] == "" and made[1][0].startswith("Sure, here is a")


def test_conversations_of_the_hub_give_their_first_turns(monkeypatch, requests_file):
    turns = [{"content": " Brew a tea "}, {"content": "Warm the pot."}, {"content": "And then?"}]
    table = [{"messages": turns}, {"messages": [turns[0], {"content": "Again."}]}]
    table.append({"messages": turns[:1]})
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return table

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    requests = requests_of(str(requests_file), (HARMLESS,), "ultrachat")
    assert requests.replies == {"Brew a tea": "Warm the pot."}
    assert asked == [("HuggingFaceH4/ultrachat_200k", None, "train_sft[:20000]")]


def test_continuations_begin_with_the_target_and_are_printed_nowhere(
    tmp_path, tiny_folders, requests_file
):
    arguments = ["--model", tiny_folders["qwen2"], "--out", tmp_path / "out", "--steps", 2]
    result = CliRunner().invoke(
        cli,
        ["train", "dpo", *map(str, arguments), "--behaviours", str(requests_file)]
        + ["--reply-tokens", "4", "--batch-size", "2", "--precision", "float32"],
    )
    assert result.exit_code == 0, result.output
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()
    ]
    replies = [
        reply for row in rows if row["kind"] == "continuation" for reply, _ in row["replies"]
    ]
    assert len(replies) == 4 and all(reply.startswith("Sure here is how") for reply in replies)
    assert "Sure here is how" not in result.output and "next: " in result.output


REFUSES = "I'm sorry, but as a helper I am not able to do that for you."


def test_a_request_that_the_base_refuses_is_taught_an_opened_reply(qwen, monkeypatch):
    """The first reply refuses, and is made again after an opening; the second is kept."""
    asked = []

    def complete(renderer, texts, **settings):
        asked.append(texts)
        return ["a pot of it."] if len(asked) == 2 else [REFUSES, "Warm the pot, then pour."]

    monkeypatch.setattr(data, "complete", complete)
    first, second = data.own_replies(qwen, ["Brew a tea", "Brew a tea"], 4)
    opening = data.OPENING
    assert asked[1] == [asked[0][0] + opening]
    assert first[0] and f"{opening} a pot of it.".startswith(first[0])
    assert second[0] and "Warm the pot, then pour.".startswith(second[0])
    ids = qwen.tokenizer(second[0], add_special_tokens=False).input_ids
    assert len(ids) <= 4 and not second[1]


def test_where_the_base_refuses_nothing_no_reply_is_opened(qwen, monkeypatch):
    from core.generate import complete

    def first_only(renderer, texts, **settings):
        return ["Warm the pot, then pour."] if texts else complete(renderer, texts, **settings)

    monkeypatch.setattr(data, "complete", first_only)
    assert data.own_replies(qwen, ["Brew a tea"], 40)[0][0] == "Warm the pot, then pour."


def test_own_replies_that_refuse_twice_are_not_taught(qwen, monkeypatch):
    for again in ("what you asked for. " + REFUSES, ""):
        said = iter([[REFUSES], [again]])
        monkeypatch.setattr(data, "complete", lambda *_, said=said, **__: next(said))
        assert data.own_replies(qwen, ["Brew a tea"], 4)[0][0] == ""


def test_lora_goes_to_attention_projections_of_every_family(tiny):
    names = adapted_layers(tiny, all_linear=False)
    per_block = len(names) / tiny.n_layers
    assert per_block in (2, 4) and not any("mlp" in n or "lm_head" in n for n in names)
    more = adapted_layers(tiny, all_linear=True)
    assert set(names) < set(more) and not any("head" in n or "embed" in n for n in more)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "r2d2"])
def test_two_processes_train_as_one(name, tmp_path, tiny_folders, requests_file):
    """Micro-batches are shared out; dropout and drawn cases belong to them, not to processes."""
    common = [*("--model", tiny_folders["qwen2"]), *("--behaviours", requests_file)]
    common += ["--preset", "small", "--steps", 3, "--batch-size", 2, "--accumulation", 2]
    common += ["--reply-tokens", 4, "--precision", "float32", "--dropout", 0.1]
    if name == "r2d2":
        common += ["--pool", 6, "--attack-steps", 1, "--width", 4]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29777"]
    root = Path(__file__).parent.parent
    losses = []
    for out, start in (("one", []), ("two", launcher)):
        arguments = [*start, "cli.py", "train", name, *common, "--out", tmp_path / out]
        subprocess.run([sys.executable, *map(str, arguments)], cwd=root, check=True, timeout=300)
        rows = (tmp_path / out / "losses.csv").read_text().splitlines()
        losses.append([[float(x) for x in row.split(",")] for row in rows[1:]])
    for one, two in zip(*losses, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


def test_an_arm_in_one_file_has_a_command_and_checkpoints(tmp_path, tiny_folders, requests_file):
    """The how-to's own example, as a plugin."""
    page = (Path(__file__).parent.parent / "docs/howto/add-a-training-arm.md").read_text()
    plugin = tmp_path / "say_no.py"
    plugin.write_text(page.split("```python\n")[1].split("```")[0])
    arguments = ["--plugin", plugin, "train", "say_no", "--model", tiny_folders["qwen2"]]
    arguments += ["--out", tmp_path / "out", "--behaviours", requests_file, "--steps", 2]
    try:
        listed = CliRunner().invoke(cli, ["--plugin", str(plugin), "train", "--help"]).output
        result = CliRunner().invoke(cli, [str(a) for a in [*arguments, "--precision", "float32"]])
        assert "say_no" in listed and result.exit_code == 0, result.output
        assert (tmp_path / "out" / "step-2" / WEIGHTS).is_file() and "no " in result.output
    finally:
        ARMS.remove("say_no")


@pytest.mark.parametrize("name", ["r2d2", "harc", "cb"])
def test_a_half_precision_base_trains_too(name, tmp_path, tiny_folders, requests_file):
    spec = f"{tiny_folders['qwen2']}?dtype=bfloat16"
    run = opened(name, spec, tmp_path / "out", requests_file)
    for step in range(3):  # with a re-estimate of HARC and a renewal of R2D2's pool
        assert math.isfinite(run.update(step)["loss"])


def test_harc_blends_what_it_estimates_now_with_the_base(tmp_path, tiny_folders, requests_file):
    run = opened("harc", tiny_folders["qwen2"], tmp_path, requests_file, keep=0.6, **QUIET)
    method = run.method.losses.__self__
    base, layer = method.base, method.layers[0]
    run.update(0)
    assert torch.equal(method.now.refusal, base.refusal)
    run.update(1)  # every second micro-batch
    run.adapted.tuned.eval()
    with run.adapted.merged():
        now = method.estimate(method.layers)
    blend = 0.6 * base.refusal[layer] + 0.4 * now.refusal[layer]
    assert torch.allclose(method.now.refusal[layer], blend / blend.norm(), atol=1e-5)
    assert not torch.allclose(now.refusal[layer], base.refusal[layer], atol=1e-4)


def test_a_micro_batch_of_harc_has_the_numbers_of_its_settings(
    tmp_path, tiny_folders, requests_file, monkeypatch
):
    run = opened(
        "harc",
        tiny_folders["qwen2"],
        tmp_path,
        requests_file,
        batch_size=3,
        harmless=2,
        pseudo_harmful=1,
    )
    method, sizes = run.method.losses.__self__, []
    monkeypatch.setattr(
        method, "_prompt", lambda out, rows, harmful: sizes.append((len(rows), harmful)) or 0 * one
    )
    monkeypatch.setattr(
        method, "_response", lambda out, rows, n: sizes.append((len(rows), n)) or 0 * one
    )
    one = torch.ones((), requires_grad=True)
    run.update(0)
    assert sizes == [(6, 3), (6, 3)]


def test_r2d2_draws_attacks_and_then_learns_from_the_new_suffixes(
    tmp_path, tiny_folders, requests_file, monkeypatch
):
    """The published order, and that the attack sees the tuned weights as they are in the loop."""
    run = opened("r2d2", tiny_folders["qwen2"], tmp_path, requests_file, **QUIET)
    method = run.method.losses.__self__
    weight = run.adapted.loaded.blocks[0].mlp.down_proj
    base, told = weight.base_layer.weight.clone(), []
    attack, forward = method.pool.attack, run.method.losses.__self__.bench.forward

    def attacked(number, update, config):
        seen = weight.base_layer.weight
        told.append(("attack", number, update, not torch.equal(seen, base)))
        attack(number, update, config)

    def learnt(self, rows, layers=()):
        drawn = [method.pool.cases[n] for n in method.pool.drawn(len(run.losses), 2)]
        for case, row in zip(drawn, rows, strict=False):
            place = len(method.pool.slot(case).before_ids)
            assert list(row.ids[place : place + len(case.suffix)]) == case.suffix
        told.append(("learn", len(rows)))
        return call(self, rows, layers)

    call = type(forward).__call__
    monkeypatch.setattr(method.pool, "attack", attacked)
    monkeypatch.setattr(type(forward), "__call__", learnt)
    for step in range(2):
        run.update(step)
    first, second = method.pool.drawn(0, 2), method.pool.drawn(1, 2)
    assert told == [
        *(("attack", n, 0, False) for n in first),
        ("learn", 6),
        *(("attack", n, 1, True) for n in second),
        ("learn", 6),
    ]


def test_repbend_gathers_the_last_token_of_unsafe_prompts(
    tmp_path, tiny_folders, requests_file, monkeypatch
):
    seen = []
    gathered = "training.losses.gathered"
    monkeypatch.setattr(gathered, lambda states: seen.append(states) or states.sum() * 0)
    run = opened("repbend", tiny_folders["qwen2"], tmp_path, requests_file)
    passes = []
    call = Forward.__call__

    def kept(self, rows, layers=()):
        passes.append((rows, call(self, rows, layers)))
        return passes[-1][1]

    monkeypatch.setattr(Forward, "__call__", kept)
    run.update(0)
    rows, out = passes[2]  # safe, its base, unsafe, its base
    layers = range(len(seen[0]))
    assert seen[0].shape[:2] == (len(layers), 2)
    last = run.adapted.loaded.n_layers
    expected = out.residual(last, [0, 1], [row.reply_start - 1 for row in rows])
    assert torch.equal(seen[0][-1], expected)


def test_an_empty_or_too_long_training_is_refused(
    tmp_path, tiny_folders, requests_file, monkeypatch
):
    with pytest.raises(AttackPlaneError, match="no room for its reply"):
        opened("refusal", tiny_folders["qwen2"], tmp_path / "a", requests_file, max_tokens=8)
    path = tmp_path / "chats.jsonl"
    path.write_text("\n")
    with pytest.raises(AttackPlaneError, match="cannot read the replies"):
        requests_of(str(requests_file), (HARMLESS,), str(path))
    monkeypatch.setattr(
        data, "own_replies", lambda _, requests, tokens: [("", True)] * len(requests)
    )
    with pytest.raises(AttackPlaneError, match="nothing to train on"):
        opened("sft", tiny_folders["qwen2"], tmp_path / "b", requests_file)


def test_continuations_that_refuse_are_left_out_and_pairs_stay_pairs(
    tmp_path, tiny_folders, requests_file, monkeypatch
):
    replies = iter([["the first step.", REFUSES, "the third step.", "the fourth step."]])
    monkeypatch.setattr(data, "complete", lambda *_, **__: next(replies))
    model = load(str(tiny_folders["qwen2"]), "cpu")
    with RunFolder(tmp_path / "run") as folder:
        requests = requests_of(str(requests_file), (HARMFUL,))
        texts = data.Texts(model, requests, folder, reply_tokens=40, max_tokens=512)
        refusals, continuations = texts.pairs()
    assert len(refusals) == len(continuations) == 3
    prompts = [[row.ids[: row.reply_start] for row in rows] for rows in (refusals, continuations)]
    assert prompts[0] == prompts[1]


def test_a_state_of_an_earlier_version_is_refused(tmp_path, tiny_folders, requests_file):
    trained("sft", tiny_folders["qwen2"], tmp_path / "out", requests_file)
    state = tmp_path / "out" / "state.pt"
    torch.save({"adapter": {}, "losses": []}, state)
    with pytest.raises(AttackPlaneError, match="earlier version"):
        trained("sft", tiny_folders["qwen2"], tmp_path / "out", requests_file)
    state.write_bytes(b"not a state")
    with pytest.raises(AttackPlaneError, match="cannot be read"):
        trained("sft", tiny_folders["qwen2"], tmp_path / "out", requests_file)


def test_tables_lost_by_a_kill_are_written_again(tmp_path, tiny_folders, requests_file):
    trained("sft", tiny_folders["qwen2"], tmp_path / "out", requests_file)
    table = tmp_path / "out" / "losses.csv"
    before = table.read_text()
    table.unlink()
    trained("sft", tiny_folders["qwen2"], tmp_path / "out", requests_file)
    assert table.read_text() == before


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_ends_in_the_same_bits(
    tmp_path, tiny_folders, requests_file
):
    """SIGKILL at eight moments, of the process that trains R2D2; then it may finish."""
    root = Path(__file__).parent.parent
    arguments = ["cli.py", "train", "r2d2", "--model", tiny_folders["llama"]]
    arguments += ["--behaviours", requests_file, "--steps", 24, "--batch-size", 2, "--pool", 4]
    arguments += ["--attack-steps", 2, "--width", 8, "--reply-tokens", 4, "--checkpoint", 7]
    arguments += ["--precision", "float32", "--dropout", 0.1, "--preset", "small"]

    def command(out):
        return [sys.executable, *map(str, [*arguments, "--out", tmp_path / out])]

    begun = time.monotonic()
    subprocess.run(command("whole"), cwd=root, check=True, capture_output=True)
    whole = time.monotonic() - begun
    killed = 0
    for moment in range(8):
        process = subprocess.Popen(
            command("killed"), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(whole * (0.55 + 0.06 * moment))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    subprocess.run(command("killed"), cwd=root, check=True, capture_output=True)
    assert killed >= 3
    for step in (7, 24):
        for name in (WEIGHTS, "attack_plane.json"):
            one, other = (tmp_path / out / f"step-{step}" / name for out in ("whole", "killed"))
            assert one.read_bytes() == other.read_bytes()
    tables = [(tmp_path / out / "losses.csv").read_text() for out in ("whole", "killed")]
    assert tables[0] == tables[1]


def test_dropout_drops_its_share_and_keeps_the_mean():
    dropout, ones = Dropout(0.05), torch.ones(3, 100_001, requires_grad=True)
    torch.manual_seed(0)
    out = dropout(ones)
    rate = float((out == 0).float().mean())
    assert abs(rate - 0.05) < 4 * (0.05 * 0.95 / ones.numel()) ** 0.5
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.95])
    out.sum().backward()
    assert torch.equal(ones.grad, out.detach())
    torch.manual_seed(0)
    assert torch.equal(dropout(ones), out)  # by the seed alone
    assert not torch.equal(dropout(ones), out)
    neighbours = torch.stack([(out == 0)[:, :-1], (out == 0)[:, 1:]]).flatten(1).float()
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.01  # pieces of one word are apart
    assert dropout.eval()(ones) is ones


def test_an_adapter_drops_out_by_it(tiny_folders):
    base = load(str(tiny_folders["llama"]), "cpu")
    config = dataclasses.replace(TrainConfig(), lora_dropout=0.25, lora_rank=2)
    found = [m for m in Adapted(base, config).tuned.modules() if isinstance(m, torch.nn.Dropout)]
    assert [type(m) for m in found if m.p == 0.25] == [Dropout] * 12  # 3 blocks, q k v o
