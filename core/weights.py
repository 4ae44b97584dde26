"""Files into model and tokenizer: the only ``from_pretrained`` here.

No code from a folder runs: ``trust_remote_code`` is False everywhere, so transformers neither asks
nor obeys. Weights must fit: a key that is missing, unexpected or wrongly shaped refuses the model
or the adapter by name, since transformers would fill the gap with random numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from core.embedded import cache_folder, convert_gguf, embedded_folder
from core.errors import AttackPlaneError
from core.files import read_object
from core.rows import Row
from core.specs import FORMS, ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HARMLESS_KEYS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.masked_bias")
"""Ends of the names of buffers that some checkpoints hold and newer models compute anew."""
GENERATION = "generation_config.json"
UNREADABLE = (Exception,)
"""What other people's readers raise from a folder that is no model: anything."""
MOST_LAYERS = 10_000


def default_device() -> torch.device:
    """CUDA, else MPS, else CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA that has it, float16 on older CUDA and MPS, float32 on the CPU."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


Places = str | dict[str, str]
"""Where the parts of a model go: a name of transformers, or a device (or disk) by module."""


def load_base(
    spec: ModelSpec, device: torch.device, places: Places | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer of a spec without its adapter, as Hugging Face makes them.

    Args:
        places: of its parts, where it is shared out over devices; ``device`` says the precision
            then.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = local_folder(spec)
    name = str(folder) if folder else spec.base
    options: Row = {
        "dtype": DTYPES[spec.dtype] if spec.dtype else default_dtype(device),
        "revision": spec.revision,
    }
    if spec.load == "4bit":
        options |= _four_bit(spec, device)
    if places:
        options |= {"device_map": places, "offload_folder": str(cache_folder() / "offload")}
    where = f"model spec {spec.text!r}"
    config = _readable_config("model", name, where, spec.revision)
    if folder and (folder / GENERATION).exists():  # transformers passes over a broken one
        read_object(folder / GENERATION, "the generation settings", remedy="mend or remove it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=spec.revision, trust_remote_code=False
        )
        with _no_bars():
            made: Any = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
    except UNREADABLE as error:
        raise _unloadable("model", name, where, error) from error
    model, report = made
    if model.config.is_encoder_decoder:
        raise AttackPlaneError(
            "not a decoder-only model", where=spec.text, got=type(model).__name__
        )
    _require_all_weights(report, where)
    _require_stop_tokens(model, where)
    if not isinstance(tokenizer.chat_template, (str, dict, type(None))):
        raise AttackPlaneError(
            "the chat template is no text",
            where=f"{where}, tokenizer_config.json",
            got=repr(tokenizer.chat_template)[:100],
            remedy="mend it, or remove it: then the model is taken as a base model",
        )
    return (model if spec.load or places else model.to(device)), tokenizer


def _require_stop_tokens(model: Any, where: str) -> None:
    """Refuse a checkpoint whose replies could not end."""
    stop = model.generation_config.eos_token_id
    ids = stop if isinstance(stop, list) else [stop]
    if stop is not None and not all(type(token) is int for token in ids):
        raise AttackPlaneError(
            "eos_token_id is no token id",
            where=f"{where}, generation_config.json",
            got=repr(stop)[:100],
            remedy="write a whole number or a list of them",
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """While open, transformers draws no progress bars. Downloads from the hub still do."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown, downloads = (
        transformers_logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    transformers_logging.disable_progress_bar()  # which turns those of the hub off too
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _readable_config(what: str, name: str, where: str, revision: str | None = None) -> Any:
    """The config of a folder or hub id. One that needs code of its own is refused."""
    from transformers import AutoConfig, PreTrainedConfig

    asked: Any = None
    try:
        asked = PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("auto_map")
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if layers > MOST_LAYERS:  # they are made before the weights are looked at
            raise ValueError(f"its config.json speaks of {layers} layers")
    except UNREADABLE as error:
        raise _unloadable(what, name, where, error, asked) from error
    return config


def _unloadable(
    what: str, name: str, where: str, error: Exception, asked: Any = None
) -> AttackPlaneError:
    """What a failure to load is told as. ``asked``: the classes of its own that a config names."""
    if "trust_remote_code" in str(error):
        return AttackPlaneError(
            f"cannot load the {what}: it asks for Python code of its own, which never runs here",
            where=where,
            got=", ".join(map(str, asked.values())) if isinstance(asked, dict) else None,
            remedy="use a model whose architecture transformers itself has",
        )
    return AttackPlaneError(
        f"cannot load the {what}",
        where=where,
        got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        remedy="check its config, tokenizer and weight files: one is broken or missing"
        if Path(name).exists()
        else "check the name, the network and, for a gated model, your access token; " + FORMS,
    )


def _require_all_weights(report: Row, where: str) -> None:
    """Refuse weights that do not fit, from transformers' own loading report."""
    faults = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[kind])
        names = [name for name in names if not name.endswith(HARMLESS_KEYS)]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            faults.append(f"{kind.removesuffix('_keys')}: {', '.join(names[:3])}{more}")
    if faults:
        raise AttackPlaneError(
            "the weights do not fit the model that its config describes",
            where=where,
            got="; ".join(faults),
            remedy="config.json and the weight files must be of one model",
        )


def merged_adapter(spec: ModelSpec, model: Any) -> Any:
    """The model with the spec's LoRA adapter merged; itself where the spec has none.

    4-bit weights cannot take a merge without being rounded anew: there the adapter stays beside.
    """
    if not spec.adapter:
        return model
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    where = f"model spec {spec.text!r}"
    try:
        saved = load_peft_weights(spec.adapter, device="cpu")
        with warnings.catch_warnings():  # of missing keys, which are refused below
            warnings.simplefilter("ignore")
            wrapped: Any = PeftModel.from_pretrained(model, spec.adapter)
    except UNREADABLE as error:
        raise AttackPlaneError(
            "cannot load the adapter",
            where=where,
            got=" ".join(str(error).split())[:400],
            remedy="it must be a LoRA folder with weights, trained on this base",
        ) from error
    own = get_peft_model_state_dict(wrapped)
    shared = set(saved) & set(own)
    _require_all_weights(
        {
            "missing_keys": set(own) - set(saved),
            "unexpected_keys": set(saved) - set(own),
            "mismatched_keys": {key for key in shared if saved[key].shape != own[key].shape},
        },
        where,
    )
    return wrapped.get_base_model() if spec.load else wrapped.merge_and_unload()


def load_classifier(name: str) -> tuple[Any, Any]:
    """A sequence classifier (hub id or folder) and its tokenizer, for a judge."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = _readable_config("classifier", name, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        with _no_bars():
            made: Any = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except UNREADABLE as error:
        raise _unloadable("classifier", name, name, error) from error
    model, report = made  # public classifiers often hold a pooler that their class does not use
    _require_all_weights({**report, "unexpected_keys": ()}, name)
    return model.eval().requires_grad_(False).to(default_device()), tokenizer


def _four_bit(spec: ModelSpec, device: torch.device) -> Row:
    from importlib.util import find_spec

    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        raise AttackPlaneError(
            "?load=4bit needs a CUDA device and bitsandbytes",
            where=f"model spec {spec.text!r}",
            got=(
                f"device {device}, bitsandbytes "
                f"{'present' if find_spec('bitsandbytes') else 'absent'}"
            ),
            remedy=(
                "pip install 'attack-plane[quantised]' on a CUDA machine, or leave ?load=4bit out"
            ),
        )
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=default_dtype(device),
    )
    return {"quantization_config": quantisation, "device_map": {"": device}}


def local_folder(spec: ModelSpec) -> Path | None:
    """The Hugging Face folder of a spec's base, made if need be. None for the hub."""
    if spec.kind == "embedded":
        return embedded_folder()
    if spec.kind == "gguf":
        return convert_gguf(Path(spec.base))
    return Path(spec.base) if spec.kind == "folder" else None


def is_offloaded(model: Any) -> bool:
    """Whether weights of a model lie on disk or beside their device, and come when needed."""
    return any(p.is_meta for p in model.parameters())


def entrance(model: Any) -> torch.device:
    """The device that a model takes its inputs on."""
    embedding = model.get_input_embeddings()
    own = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if own is None else torch.device(own)
