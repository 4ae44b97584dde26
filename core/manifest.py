"""The manifest of a run: how it is read, and what a result depends on besides its settings."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from core.errors import AttackPlaneError
from core.files import read_object
from core.records import require_version
from core.rows import Row


def read_manifest(path: Path) -> Row:
    """The manifest of a run.

    Raises:
        AttackPlaneError: it is broken, or of another version of the suite.
    """
    remedy = "restore the file, or choose another run folder"
    manifest = read_object(path, "the manifest of a run", remedy=remedy)
    for key, kind in {"stages": dict, "models": dict, "history": list}.items():
        if not isinstance(manifest.get(key), kind):
            got = f"{key} is a {type(manifest[key]).__name__}" if key in manifest else f"no {key}"
            raise AttackPlaneError("not the manifest of a run", where=path, got=got, remedy=remedy)
    for key, kind in {"stages": dict, "models": str}.items():
        for name, value in manifest[key].items():
            if not isinstance(value, kind):
                got, where = repr(value)[:100], f"{path}, {key}, {name}"
                raise AttackPlaneError(
                    "not the manifest of a run", where=where, got=got, remedy=remedy
                )
    what = "the run was written by another version of the suite"
    require_version(manifest.get("schema_version"), what, path, remedy)
    return manifest


def environment_versions() -> Row:
    """Versions that a result depends on: Python, the main packages, this suite's git commit."""
    packages: dict[str, str | None] = {}
    for package in ("torch", "transformers", "tokenizers", "peft", "numpy"):
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = None
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {"python": platform.python_version(), **packages, "git_commit": commit or None}
