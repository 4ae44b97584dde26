"""What a model's files may not do: run code, or leave gaps that random numbers fill."""

import io
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.cast import load_cast
from core.errors import AttackPlaneError
from core.fingerprint import fingerprint
from core.models import ModelHandle, load
from core.specs import parse_spec
from core.weights import load_classifier
from tests.conftest import make_model
from training.saved import saved_state

CODE = """
from pathlib import Path

Path({marker!r}).write_text("the code ran")
from transformers import LlamaConfig as Own, LlamaForCausalLM as Model
"""


@pytest.mark.parametrize("kind", ["model", "tokenizer", "classifier"])
def test_code_from_a_folder_never_runs_whatever_is_answered(tmp_path, monkeypatch, kind):
    folder, marker = make_model(tmp_path / "m", "llama"), tmp_path / "marker"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    name = "tokenizer_config.json" if kind == "tokenizer" else "config.json"
    config = json.loads((folder / name).read_text())
    if kind == "tokenizer":
        config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    else:
        classes = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
        auto = {"AutoConfig": "own.Own", **dict.fromkeys(classes, "own.Model")}
        config |= {"model_type": "own-kind", "auto_map": auto}
    (folder / name).write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    with pytest.raises(AttackPlaneError, match="cannot load"):
        load_classifier(str(folder)) if kind == "classifier" else load(str(folder), "cpu")
    assert not marker.exists()


def changed(tmp_path, change, family="llama"):
    """A model folder whose weights went through ``change``."""
    folder = make_model(tmp_path / "m", family)
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return str(folder)


def test_missing_unexpected_and_wrongly_shaped_weights_refuse_the_model_by_name(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(AttackPlaneError, match=rf"missing: {name}"):
        load(changed(tmp_path / "a", lambda w: w.pop(name)), "cpu")
    with pytest.raises(AttackPlaneError, match=r"unexpected: model\.layers\.7\.extra"):
        extra = {"model.layers.7.extra": torch.zeros(2)}
        load(changed(tmp_path / "b", lambda w: w.update(extra)), "cpu")
    with pytest.raises(AttackPlaneError, match="up_proj"):
        wrong = {name: torch.zeros(3, 3)}
        load(changed(tmp_path / "c", lambda w: w.update(wrong)), "cpu")


def test_a_config_of_five_layers_over_three_is_refused(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AttackPlaneError, match=r"missing: model\.layers\.3"):
        load(str(folder), "cpu")


def test_tied_heads_and_known_buffers_are_no_fault(tmp_path):
    buffer = {"model.rotary_emb.inv_freq": torch.zeros(4)}
    assert load(changed(tmp_path / "a", lambda w: w.update(buffer)), "cpu").n_layers == 3
    folder = make_model(tmp_path / "tied", "qwen2")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load(str(folder), "cpu").n_layers == 3


@pytest.fixture
def adapter(tmp_path, tiny_folders):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folders["llama"])
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_with_foreign_or_missing_keys_is_refused_by_name(adapter, tiny_folders):
    spec = f"{tiny_folders['llama']}+{adapter}"
    assert load(spec, "cpu").n_layers == 3
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    foreign = {k.replace("layers.0", "layers.9"): v for k, v in weights.items()}
    save_file(foreign, file)
    with pytest.raises(AttackPlaneError, match=r"missing: .*layers\.0.*unexpected: .*layers\.9"):
        load(spec, "cpu")
    shape = {k: torch.zeros(1, 1) for k in weights}
    save_file(shape, file)
    with pytest.raises(AttackPlaneError, match=r"size mismatch for .*layers\.0"):
        load(spec, "cpu")


def test_a_handle_knows_the_fingerprint_without_the_weights(adapter, tiny_folders, monkeypatch):
    for spec in (
        str(tiny_folders["qwen2"]),
        f"{tiny_folders['qwen2']}?dtype=bfloat16",
        f"{tiny_folders['llama']}+{adapter}",
    ):
        assert ModelHandle(spec).fingerprint == load(spec).fingerprint
    told = []
    handle = ModelHandle(str(tiny_folders["qwen2"]), told.append)
    assert not told and handle.loaded.n_layers == 3 and handle.loaded is told[0]
    handle.release()
    assert handle.loaded is not told[0] and len(told) == 2
    with pytest.raises(AttackPlaneError, match="not a model spec"):
        ModelHandle("nonsense")


def test_a_folder_without_weights_is_a_clear_error(tmp_path, tiny_folders):
    shutil.copytree(tiny_folders["llama"], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(AttackPlaneError, match="cannot load the model"):
        load(str(tmp_path / "m"), "cpu")
    assert parse_spec(str(tmp_path / "m")).kind == "folder"


def test_a_fingerprint_is_of_what_weights_and_settings_are(adapter, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(adapter, folder)
    spec, file = parse_spec(f"embedded+{folder}"), folder / "adapter_config.json"
    before, config = fingerprint(spec, None, "c"), json.loads(file.read_text())
    assert len(config["target_modules"]) > 1
    same = {k: config[k] for k in reversed(config)} | {"base_model_name_or_path": "/elsewhere"}
    same["target_modules"] = config["target_modules"][::-1]
    file.write_text(json.dumps(same))
    (folder / "attack_plane.json").write_text("{}")
    assert fingerprint(spec, None, "c") == before
    file.write_text(json.dumps(same | {"lora_alpha": 999}))
    assert fingerprint(spec, None, "c") != before


def test_code_beside_an_adapter_a_hook_or_a_saved_training_never_runs(
    adapter, tmp_path, monkeypatch
):
    marker = tmp_path / "marker"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    folder = tmp_path / "copy"
    shutil.copytree(adapter, folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForCausalLM": "own.Model"},
        "auto_mapping": {"base_model_class": "Model", "parent_library": "own"},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = config["base_model_name_or_path"]
    with suppress(AttackPlaneError):  # it may be refused, or loaded as what it is
        load(f"{base}+{folder}", "cpu")

    class Hostile:
        def __reduce__(self):
            return Path.write_text, (marker, "the code ran")

    state, hook = tmp_path / "state.pt", tmp_path / "hook"
    torch.save({"adapter": Hostile()}, state)
    with pytest.raises(AttackPlaneError, match="cannot be read"):
        saved_state(state)
    hook.mkdir()
    (hook / "cast.json").write_text("{}")
    (hook / "cast.safetensors").write_bytes(state.read_bytes())
    with pytest.raises(AttackPlaneError, match="CAST"):
        load_cast(hook)
    assert not marker.exists()
