"""Files into model and tokenizer, and what stands for them: the only ``from_pretrained`` here.

No code from a folder runs: ``trust_remote_code`` is False everywhere, so transformers neither asks
nor obeys. Weights must fit: a key that is missing, unexpected or wrongly shaped refuses the model
or the adapter by name, since transformers would fill the gap with random numbers.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.cards import CARD
from core.embedded import convert_gguf, embedded_folder
from core.errors import AttackPlaneError
from core.rows import Row
from core.specs import FORMS, ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HARMLESS_KEYS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.masked_bias")
"""Ends of the names of buffers that some checkpoints hold and newer models compute anew."""
UNREADABLE = (Exception,)
"""What other people's readers raise from a folder that is no model: anything."""
MOST_LAYERS = 10_000
SAMPLES, SAMPLE_BYTES = 64, 1 << 16
SETTINGS_BYTES = 1 << 18
"""A larger JSON file is a tokenizer, and is hashed as weights are."""
HASHED = (".safetensors", ".bin", ".json", ".jinja", ".model")
ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
SETS = ("target_modules", "modules_to_save", "exclude_modules")


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


def load_base(spec: ModelSpec, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer of a spec without its adapter, as Hugging Face makes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = local_folder(spec)
    name = str(folder) if folder else spec.base
    options: Row = {
        "dtype": DTYPES[spec.dtype] if spec.dtype else default_dtype(device),
        "revision": spec.revision,
    }
    if spec.load == "4bit":
        options |= _four_bit(spec, device)
    where = f"model spec {spec.text!r}"
    config = _readable_config("model", name, where, spec.revision)
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
        raise _unloadable("model", where, error) from error
    model, report = made
    if model.config.is_encoder_decoder:
        raise AttackPlaneError(
            "not a decoder-only model", where=spec.text, got=type(model).__name__
        )
    _require_all_weights(report, where)
    return (model if spec.load else model.to(device)), tokenizer


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
        raise _unloadable(what, where, error, asked) from error
    return config


def _unloadable(what: str, where: str, error: Exception, asked: Any = None) -> AttackPlaneError:
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
        remedy="check the name, the network and, for a gated model, your access token; " + FORMS,
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
        raise _unloadable("classifier", name, error) from error
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


# --- what stands for weights ----------------------------------------------------------------------
def identity(
    spec: ModelSpec, precision: str | None = None, *, commit: str | None = None
) -> str | None:
    """What a result depends on besides the code: a hash of the weights, and their precision.

    Reads samples of the files and loads no weights. None where it cannot be known without
    loading: a model of the hub of which the local cache has no commit.
    """
    folder = local_folder(spec)
    if folder is None and commit is None:
        commit = _cached_commit(spec)
        if commit is None and precision is None:
            return None
    dtype = spec.dtype or str(default_dtype(default_device())).removeprefix("torch.")
    return f"{fingerprint(spec, folder, commit)}-{precision or spec.load or dtype}"


def _cached_commit(spec: ModelSpec) -> str | None:
    """The commit of a hub model that the local cache would serve, if it holds one."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(spec.base, "config.json", revision=spec.revision or "main")
    return Path(path).parent.name if isinstance(path, str) else None


def at_cached_commit(spec: ModelSpec) -> ModelSpec:
    """The spec of a hub model at the commit that the local cache holds, else the spec itself."""
    commit = _cached_commit(spec) if spec.kind == "hub" else None
    return replace(spec, revision=commit) if commit else spec


def fingerprint(spec: ModelSpec, folder: Path | None, commit: str | None = None) -> str:
    """The hub's commit, or a hash of what weights and settings are; then that of the adapter.

    Of each weight file 64 blocks of 64 KiB, evenly spaced, are read: any retraining changes them,
    and an 8B model takes well under a second. Settings are hashed as canonical JSON, whatever the
    order of their keys or of layers that are a set. Of an adapter's settings, what says where it
    came from is left out, and so is what this suite writes beside it.
    """
    digest = hashlib.sha256()
    if folder is None:
        digest.update(f"{spec.base} {commit or spec.revision}".encode())
    for path in (folder, Path(spec.adapter) if spec.adapter else None):
        for file in _hashed_files(path) if path else ():
            size = file.stat().st_size
            if file.suffix == ".json" and size <= SETTINGS_BYTES:
                digest.update(f"{file.name} {_canonical(file)}".encode())
                continue
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as handle:
                for index in range(SAMPLES):
                    handle.seek(index * size // SAMPLES)
                    digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _hashed_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.glob("*")):
        if file.suffix in HASHED and file.name != CARD and file.is_file():
            yield file


def _canonical(file: Path) -> str:
    """The settings of a JSON file as one text; the file itself where it is no JSON."""
    content = file.read_bytes()
    try:
        values = json.loads(content)
    except ValueError:
        return hashlib.sha256(content).hexdigest()
    if file.name == "adapter_config.json" and isinstance(values, dict):
        values = {k: v for k, v in values.items() if k not in ORIGIN}
        sets = {k: sorted(v) for k, v in values.items() if k in SETS and isinstance(v, list)}
        values |= sets
    return json.dumps(values, sort_keys=True)


def fingerprint_of_parameters(model: Any) -> str:
    """A hash over names, shapes and 256 evenly spaced values of every parameter in memory."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if len(flat):  # whole numbers: a float32 index is wrong from 2^24 on
            places = torch.arange(256, device=flat.device) * (len(flat) - 1) // 255
            digest.update(flat[places].float().cpu().numpy().tobytes())
    return f"{digest.hexdigest()[:16]}-{str(model.dtype).removeprefix('torch.')}"
