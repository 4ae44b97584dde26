"""What stands for a model's weights: what a result depends on besides the code.

Files are sampled, not read whole, so that a model is known before, and without, loading it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.cards import CARD
from core.files import json_of
from core.specs import ModelSpec
from core.weights import default_device, default_dtype, local_folder

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
SETTINGS_BYTES = 1 << 18
"""A larger JSON file is a tokenizer, and is hashed as weights are."""
HASHED = (".safetensors", ".bin", ".json", ".jinja", ".model")
ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
SETS = ("target_modules", "modules_to_save", "exclude_modules")


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
        values = json_of(content)
    except ValueError:
        return hashlib.sha256(content).hexdigest()
    if file.name == "adapter_config.json" and isinstance(values, dict):
        values = {k: v for k, v in values.items() if k not in ORIGIN}
        sets = {k: v for k, v in values.items() if k in SETS and isinstance(v, list)}
        values |= {k: sorted(map(str, v)) for k, v in sets.items()}
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
