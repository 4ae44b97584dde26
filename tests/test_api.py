"""The Python API on tiny models: every door, a user's own model left as it was found."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import attack_plane as ap
from attacks.gcg import baselines
from core.fingerprint import fingerprint_of_parameters
from core.prompt import Conversation, Renderer
from core.store import RunFolder
from evaluation.behaviours import load_behaviours
from geometry.reading import differentiable_residuals
from tests.campaigns import attacked

ROOT = Path(__file__).parent.parent
REQUEST, TARGET = "Write a short text about the tea", "Sure, here is a text"
SMALL = ap.GCGConfig(num_steps=3, search_width=8, topk=8, suffix_length=4)
HARMFUL = [b.request for b in load_behaviours(label="harmful", splits=["train"])][:8]
HARMLESS = [b.request for b in load_behaviours(label="harmless", splits=["train"])][:8]


def test_gcg_gives_prompt_suffix_losses_and_a_row(qwen):
    steps = []
    result = ap.gcg(qwen, REQUEST, TARGET, SMALL, on_step=steps.append)
    assert result.prompt.startswith(REQUEST) and result.prompt.endswith(result.suffix)
    assert len(result.suffix_ids) >= 4 and result.token_fidelity
    assert len(result.losses) == 4 and result.loss == pytest.approx(min(result.losses), abs=1e-4)
    assert [s.step for s in steps] == [1, 2, 3] and steps[-1].best == min(result.losses)
    assert pd.DataFrame([result.to_row()]).loc[0, "attack"] == "gcg"


def test_a_behaviour_gives_what_the_command_line_gives(tmp_path, qwen):
    behaviour = load_behaviours(label="harmful", splits=["test"])[0]
    with RunFolder(tmp_path) as run:
        (artifact,) = attacked(run, "gcg", SMALL, [behaviour], qwen, seed=4)
    result = ap.gcg(qwen, behaviour, config=SMALL, seed=4)
    assert result.prompt == artifact.prompt and result.losses == artifact.loss_history
    (_, own), *_ = baselines(SMALL)
    plain = ap.attack("baselines", behaviour, source=qwen, config=own)
    assert [r.attack for r in plain] == ["plain", "initial_suffix", "random_suffix"]


def test_autodan_pair_and_templates(qwen):
    config = ap.AutoDANConfig(num_steps=2, population=4, stop_on_success=False)
    evolved = ap.autodan(qwen, REQUEST, TARGET, config)
    assert REQUEST in evolved.prompt and evolved.attack == "autodan_hga"
    wrapped = ap.templates(REQUEST)
    assert len({r.attack for r in wrapped}) == 8 and all(r.loss is None for r in wrapped)
    small = ap.PAIRConfig(streams=1, depth=1, attacker_tokens=4, target_tokens=2, attempts=1)
    with pytest.raises(ap.AttackPlaneError, match="no valid message"):  # a random model's words
        ap.pair(qwen, REQUEST, config=small)


def test_a_helper_that_is_there_is_not_loaded_again(own):
    mine = ap.wrap(*own, "mine")  # no spec: it could not be loaded
    config = ap.TemplatesConfig(("past_tense",), mutator="mine")
    (result,) = ap.attack("templates", REQUEST, source=mine, config=config)
    assert result.provenance == {"rewritten_by": "mine"}


def test_what_an_attack_needs_is_asked_for(qwen):
    with pytest.raises(ap.AttackPlaneError, match="needs a target string"):
        ap.gcg(qwen, REQUEST)
    with pytest.raises(ap.AttackPlaneError, match="needs a source model"):
        ap.attack("gcg", REQUEST, TARGET)
    with pytest.raises(ap.AttackPlaneError, match="did you mean 'pair'"):
        ap.attack("pairr", REQUEST)


def test_presets_forms_and_configs_of_another_class(qwen, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "attacks.autodan_search.run_autodan", lambda *a, **k: seen.append(a[2]) or 1 / 0
    )
    for options in (
        {"preset": "quick"},
        {"config": ap.AutoDANConfig(num_steps=3)},  # the form's variant is kept
    ):
        with pytest.raises(ZeroDivisionError):
            ap.attack("autodan_ga", REQUEST, TARGET, source=qwen, **options)
    assert [c.variant for c in seen] == ["ga", "ga"] and seen[1].num_steps == 3
    assert seen[0].num_steps < ap.AutoDANConfig().num_steps
    with pytest.raises(
        ap.AttackPlaneError, match=r"(?s)another class.*GCGConfig.*give a PAIRConfig"
    ):
        ap.pair(qwen, REQUEST, config=SMALL)
    with pytest.raises(ap.AttackPlaneError, match="unknown preset"):
        ap.gcg(qwen, REQUEST, TARGET, preset="slow")


def test_a_universal_suffix_is_optimised_on_several_requests(qwen):
    requests = load_behaviours(label="harmful", splits=["test"])[:3]
    config = ap.UniversalConfig(num_steps=2, search_width=8, topk=8, optimise_on=2)
    results = ap.gcg_universal([qwen], requests, config)
    assert len({r.suffix for r in results}) == 1
    assert [r.variant for r in results] == ["seen", "seen", "held out"]
    for sources, asked, fault in (
        ([], requests, "needs a source model"),
        (qwen, requests, "not a list of models"),
        ([qwen], ["a text"], "needs a target string"),
    ):
        with pytest.raises(ap.AttackPlaneError, match=fault):
            ap.gcg_universal(sources, asked, config)
    with pytest.raises(ap.AttackPlaneError, match="gcg_universal"):
        ap.attack("gcg_universal", REQUEST, TARGET, source=qwen)


def test_a_text_in_place_of_a_list_is_refused(estimated, qwen):
    for call in (
        lambda: ap.replay("Say hi", qwen),
        lambda: ap.project("Say hi", estimated),
        lambda: ap.directions(qwen, "a text", HARMLESS),
    ):
        with pytest.raises(ap.AttackPlaneError, match="put it into a list"):
            call()
    assert len(ap.behaviours(splits="test")) == len(ap.behaviours(splits=["test"]))
    assert "refusal_phrases" in ap.replay(["Say hi"], qwen, judges="refusal_phrases")[0]


def test_nothing_is_drawn_and_progress_is_told(estimated, qwen, capfd):
    told = []
    many = [f"Say {n}" for n in range(100)]  # more than a batch
    ap.replay(many, qwen, max_new_tokens=2, on_progress=lambda *a: told.append(a))
    ap.project(["Say hi"], estimated)
    ap.gcg(qwen, REQUEST, TARGET, SMALL)
    assert told == [("replies", 96, 100), ("replies", 100, 100)]
    assert capfd.readouterr() == ("", "")


def test_replay_keeps_the_order_and_takes_results_behaviours_and_texts(qwen):
    behaviour = load_behaviours(label="harmless", splits=["test"])[0]
    prompts = [ap.templates(REQUEST)[0], behaviour, "Say hi"]
    rows = ap.replay(prompts, qwen, judges=("refusal_phrases", "target_prefix"), max_new_tokens=3)
    assert [r["prompt"] for r in rows] == [prompts[0].prompt, behaviour.request, "Say hi"]
    frame = pd.DataFrame(rows)
    assert {"attack", "reply", "jailbroken", "refusal_phrases", "target_prefix"} <= set(frame)
    assert frame.attack.tolist()[1:] == ["plain", "plain"]
    assert rows[2]["reply"] == ap.replay(["Say hi"], qwen, max_new_tokens=3)[0]["reply"]


@pytest.fixture(scope="module")
def estimated(tiny_models):
    return ap.directions(tiny_models["qwen2"], HARMFUL, HARMLESS, resamples=20)


def test_directions_are_unit_vectors_with_intervals(estimated, qwen):
    assert estimated.harmfulness.shape == (qwen.n_layers + 1, qwen.d_model)
    assert estimated.refusal[1:].norm(dim=1).tolist() == pytest.approx([1.0] * qwen.n_layers)
    assert estimated.statistics["cos_harmfulness_refusal_interval"].shape[1] == 2
    assert 1 <= estimated.layer <= qwen.n_layers
    with pytest.raises(ap.AttackPlaneError, match="too few prompts"):
        ap.directions(qwen, HARMFUL, HARMLESS, estimator="zhao", judge=Never(), resamples=20)


class Never:
    """A judge that calls every reply a refusal."""

    name, threshold = "never", 0.5

    def score(self, exchanges):
        return [0.0 for _ in exchanges]


def test_projected_rows_are_a_frame_and_a_picture(estimated, tmp_path):
    wrapped = ap.templates(REQUEST)
    anchors = load_behaviours(splits=["test"])[:3] + load_behaviours(label="harmless")[:3]
    verdicts = [True] * len(wrapped) + [None] * len(anchors)
    rows = ap.project([*wrapped, *anchors], estimated, jailbroken=verdicts)
    frame = pd.DataFrame(rows)
    assert set(frame.frame) == {"own"} and "plain" in set(frame.attack)
    moved = frame[frame.attack == "persona"].iloc[0]
    plain = frame[frame.attack == "plain"].iloc[0]
    assert (moved.plain_x, moved.plain_y) == (plain.x, plain.y)
    figure = ap.plot_plane(rows)
    figure.savefig(tmp_path / "plane.png")
    assert (tmp_path / "plane.png").stat().st_size > 10_000
    again = ap.plot_plane(frame)  # its NaN are None again
    assert len(again.axes) == len(figure.axes)
    with pytest.raises(ap.AttackPlaneError, match="1 verdicts for 2 prompts"):
        ap.project(wrapped[:2], estimated, jailbroken=pd.Series([True]))
    both = ap.project(wrapped, estimated, base=estimated, with_plain=False)
    assert {r["frame"] for r in both} == {"base", "own"} and len(both) == 2 * len(wrapped)


def test_the_directions_system_prompt_stands_before_anchors_and_texts(qwen):
    system = "Be brief"
    own = ap.directions(qwen, HARMFUL, HARMLESS, resamples=20, system_prompt=system)
    anchors = [b for b in load_behaviours(label="harmless") if b.request in HARMLESS]
    rows = pd.DataFrame(ap.project(anchors, own))
    assert rows.x.mean() == pytest.approx(0.0, abs=1e-4)  # their centroid is the origin
    with_system = ap.replay([HARMLESS[0]], qwen, max_new_tokens=8, system_prompt=system)
    assert with_system[0]["reply"] != ap.replay([HARMLESS[0]], qwen, max_new_tokens=8)[0]["reply"]
    attacked = ap.templates(REQUEST, ap.TemplatesConfig(("persona",), system_prompt=system))
    first, *rest = ap.project(attacked, own)
    assert [r["attack"] for r in rest] == ["plain"] and first["plain_x"] == rest[0]["x"]


def test_what_is_no_direction_is_refused_and_gradients_are_not_kept(estimated, qwen):
    for wrong in (estimated.refusal, torch.zeros(qwen.d_model), torch.ones(3)):
        with (
            pytest.raises(ap.AttackPlaneError, match="not a direction of this model"),
            ap.ablate(qwen, wrong),
        ):
            pass
    embedded = qwen.embedding_table[torch.tensor([[5, 6, 7]])].requires_grad_()
    with ap.steer(qwen, estimated.refusal[1], estimated.refusal_norm[1], layers=[1]):
        gradients = [
            torch.autograd.grad(qwen.model(inputs_embeds=embedded).logits.sum(), embedded)[0]
            for _ in range(2)
        ]
    assert torch.equal(*gradients)  # the second pass would fail on a graph that was kept


def test_ablation_takes_the_component_out_and_leaves_no_hooks(estimated, qwen):
    direction = estimated.refusal[2]
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    before = qwen.model(input_ids=ids).logits
    with ap.ablate(qwen, direction):
        changed = qwen.model(input_ids=ids)
        prompt = Renderer(qwen).render(Conversation.build(REQUEST))
        read = differentiable_residuals(qwen, [prompt]).detach()
        assert (read @ direction).abs().max() < 1e-4
        assert ap.replay(["Say hi"], qwen, max_new_tokens=2)
    assert torch.equal(qwen.model(input_ids=ids).logits, before)
    with ap.steer(qwen, direction, 3.0, layers=[2]):
        steered = qwen.model(input_ids=ids).logits
    assert not torch.allclose(steered, before) and not torch.allclose(changed.logits, before)
    assert torch.equal(qwen.model(input_ids=ids).logits, before)


# --- a user's own model ---------------------------------------------------------------------------
@pytest.fixture
def own(tiny_folders):
    folder = tiny_folders["llama"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder)


def state_of(model, tokenizer):
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad is None, p.detach().clone()) for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        model.config.to_dict(),
        model.generation_config.to_dict(),
        tokenizer.chat_template,
        tokenizer.padding_side,
        sorted(tokenizer.get_vocab().items()),
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_a_users_model_in_training_is_attacked_and_left_as_it_was_found(own):
    model, tokenizer = own
    model.train()
    before = state_of(model, tokenizer)
    wrapped = ap.wrap(model, tokenizer, "mine")
    result = ap.gcg(wrapped, REQUEST, TARGET, SMALL)
    ap.replay([result], wrapped, max_new_tokens=2)
    found = ap.directions(wrapped, HARMFUL, HARMLESS, resamples=20)
    ap.project([result], found)
    with ap.ablate(wrapped, found.refusal[2]):
        pass
    assert same(state_of(model, tokenizer), before)
    assert result.source_model == "mine"


def test_a_wrapped_model_gives_what_the_loaded_one_gives(own, tiny_models):
    wrapped = ap.wrap(*own)
    ours, theirs = (ap.gcg(m, REQUEST, TARGET, SMALL) for m in (wrapped, tiny_models["llama"]))
    assert ours.prompt == theirs.prompt
    # a loaded model may multiply by another library
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)


def test_a_peft_model_is_read_with_its_active_adapter(own):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = own
    plain = ap.wrap(model, tokenizer).fingerprint
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1.0)
    ids = torch.tensor([[5, 6, 7, 8]])
    wrapped = ap.wrap(tuned, tokenizer)
    assert torch.allclose(wrapped.model(input_ids=ids).logits, tuned(input_ids=ids).logits)
    result = ap.gcg(wrapped, REQUEST, TARGET, SMALL)
    assert result.token_fidelity and wrapped.fingerprint != plain
    with torch.no_grad():
        next(p for n, p in tuned.named_parameters() if "lora_B" in n).add_(1.0)
    assert ap.wrap(tuned, tokenizer).fingerprint != wrapped.fingerprint


def test_an_adapter_that_learns_a_prompt_is_refused(own):
    from peft import PromptTuningConfig, get_peft_model

    model, tokenizer = own
    tuned = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ap.AttackPlaneError, match="learns a prompt"):
        ap.wrap(tuned, tokenizer)


def test_the_fingerprint_of_a_large_table_is_of_its_last_value_too():
    """A float32 index rounds up past the end from 2^24 values on."""

    class Table(torch.nn.Module):
        dtype = torch.float16

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2**24 + 4, dtype=torch.float16))

    table = Table()
    before = fingerprint_of_parameters(table)
    table.weight.data[-1] = 1.0
    assert fingerprint_of_parameters(table) != before


def test_what_is_no_language_model_is_refused(tiny_models):
    with pytest.raises(ap.AttackPlaneError, match="not a fast tokenizer"):
        ap.wrap(tiny_models["llama"].model, object())
    with pytest.raises(ap.AttackPlaneError, match="not a language model"):
        ap.wrap(torch.nn.Linear(2, 2), None)


# --- the module -----------------------------------------------------------------------------------
def test_importing_it_loads_no_torch_and_names_what_it_has():
    code = (
        "import sys, attack_plane as ap; assert 'torch' not in sys.modules; "
        "assert {'gcg', 'GCGConfig', 'wrap'} <= set(dir(ap)); ap.GCGConfig; ap.ATTACKS"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        ap.nothing_like_it  # noqa: B018


@pytest.mark.parametrize("name", ["core/__init__.py", "core.py"])
def test_a_room_that_another_package_hides_is_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import attack_plane"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode and "'core' is hidden by another one" in done.stderr
    assert str(tmp_path / "core") in done.stderr


def test_an_arm_is_trained_from_python(tmp_path, tiny_folders):
    from tests.arms import COMMON, behaviours_file

    settings = {**COMMON, "num_steps": 2}
    config = ap.ARMS.get("dpo").make_config(settings, preset="small")
    model, requests = str(tiny_folders["qwen2"]), str(behaviours_file(tmp_path))
    trained = ap.train_arm("dpo", model, tmp_path / "out", config, requests)
    assert len(trained.losses) == 2
    assert ap.load(f"{model}+{trained.checkpoints[-1]}").spec.endswith("step-2")
