"""Tiny models and tokenizers, made on the spot: random weights, a tokenizer trained on a few
sentences, no network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before huggingface_hub reads them: tests use no network, and a hub cache of their own.
os.environ["HF_HUB_OFFLINE"] = "1"
HUB = tempfile.TemporaryDirectory(prefix="attack-plane-hub-")  # gone when the process ends
os.environ["HF_HUB_CACHE"] = HUB.name

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from core.embedded import SHA256, cache_folder, is_whole
from core.models import LoadedModel, load
from core.prompt import Renderer
from evaluation.behaviours import load_behaviours

CORPUS = [b.request for b in load_behaviours("demonstration-v1")]
CORPUS += ["! ! ! ! ! !", "x x x x x x", "Sure, here is a short text about the tea."]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama-2's form: the system prompt inside the first turn, trimmed content, a space before the
# reply.
INST = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<<SYS>>' + m.content + '<</SYS>> ' }}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Gemma's form: no system prompt, another word for the assistant.
TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def byte_level(
    template: str | None, specials: list[str], *, bos: str | None = None
) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer (byte-level BPE)."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=specials[-1], pad_token=specials[-1], bos_token=bos
    )
    tokenizer.chat_template = template
    return tokenizer


def metaspace(template: str | None) -> PreTrainedTokenizerFast:
    """A Llama-2-like tokenizer: metaspace, byte fallback, BOS added by default, a decoder that
    drops a first space."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    raw.train_from_iterator(
        [w for line in CORPUS for w in line.replace(" ", " ▁").split(" ")], trainer
    )
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "chatml": lambda: byte_level(CHATML, ["<|im_start|>", "<|im_end|>"]),
    "turns": lambda: byte_level(
        TURNS, ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"], bos="<bos>"
    ),
    "inst": lambda: metaspace(INST),
    "none": lambda: byte_level(None, ["<|endoftext|>"]),
}

FAMILIES = {
    "llama": (LlamaConfig, {}, "inst"),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}, "chatml"),
    "qwen3": (Qwen3Config, {"head_dim": 8}, "chatml"),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 5.0,
        },
        "turns",
    ),
    "mistral": (MistralConfig, {"sliding_window": 12, "head_dim": 8}, "inst"),
    "phi3": (Phi3Config, {"pad_token_id": 0}, "chatml"),
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 8,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
        },
        "turns",
    ),
    "gpt2": (GPT2Config, {}, "none"),
}


def make_model(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Save a tiny random model of a family with its tokenizer; returns the folder."""
    config_class, extra, kind = FAMILIES.get(family, (None, {}, "none"))
    tokenizer = TOKENIZERS[kind]()
    special = {
        "vocab_size": len(tokenizer) + 3,  # some ids that no token has, as in real checkpoints
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if family == "bloom":
        config = BloomConfig(hidden_size=32, n_layer=3, n_head=4, **special)
    elif family == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=512, **special)
    else:
        config = config_class(**{**COMMON, **special, **extra})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # larger weights, so that attention and prompts matter
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.7 if "embed" in name or "wte" in name else 0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_model(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def tiny_models(tiny_folders) -> dict[str, LoadedModel]:
    return {family: load(str(folder), "cpu") for family, folder in tiny_folders.items()}


@pytest.fixture(params=list(FAMILIES))
def tiny(request, tiny_models) -> LoadedModel:
    """Each family in turn."""
    return tiny_models[request.param]


@pytest.fixture
def qwen(tiny_models) -> LoadedModel:
    return tiny_models["qwen2"]


@pytest.fixture
def renderer(qwen) -> Renderer:
    return Renderer(qwen)


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """The real small model; skipped where `make setup` has not fetched it, since tests use no
    network."""
    if not is_whole(cache_folder() / "converted" / SHA256[:16]):
        pytest.skip("the embedded model is not in the cache (make setup)")
    return load("embedded")
