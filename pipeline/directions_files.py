"""Save and load directions: tensors as safetensors, everything else as JSON beside them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from core.errors import AttackPlaneError
from core.files import read_object, write_atomically
from core.readings import Directions
from core.records import require_version
from core.rows import Row
from core.specs import canonical_name
from core.typed import from_values


def directions_path(folder: Path, model: str, estimator: str) -> Path:
    return folder / "directions" / f"{canonical_name(model)}.{estimator}.safetensors"


def save_directions(directions: Directions, folder: Path, extra: dict[str, object]) -> Path:
    """Write ``directions/MODEL.ESTIMATOR.safetensors`` and its JSON; returns the tensors' path."""
    path = directions_path(folder, directions.model, directions.estimator)
    tensors: dict[str, Tensor] = {n: getattr(directions, n) for n in Directions.TENSORS}
    tensors |= {f"statistics.{n}": t for n, t in directions.statistics.items()}
    content = save({n: t.contiguous() for n, t in tensors.items()})
    write_atomically(path, content)
    description = {
        "schema_version": directions.schema_version,
        "model": directions.model,
        "estimator": directions.estimator,
        "sample_counts": directions.sample_counts,
        "settings": directions.settings,
        "tensors": _hash_of(content),
        **extra,
    }
    write_atomically(path.with_suffix(".json"), json.dumps(description, indent=2) + "\n")
    return path


def load_directions(folder: Path, model: str, estimator: str) -> Directions:
    """Raises AttackPlaneError if this model's directions are not in the run."""
    path = directions_path(folder, model, estimator)
    if not path.exists() or not path.with_suffix(".json").exists():
        raise AttackPlaneError(
            f"no {estimator} directions of this model in the run",
            where=path,
            got=model,
            remedy="estimate its directions in this run first"
            + (" (a model that never refuses has none: use harc)" if estimator == "zhao" else ""),
        )
    remedy = "estimate this model's directions anew"
    description = read_object(path.with_suffix(".json"), "the description", remedy=remedy)
    require_version(
        description.get("schema_version"),
        "directions of another version of the suite",
        path.with_suffix(".json"),
        remedy,
    )
    if description.get("model") != model:
        raise AttackPlaneError(
            "these directions are of another model",
            where=path,
            got=description.get("model"),
            remedy=f"expected {model}",
        )
    prefix = "statistics."
    known = from_values(
        _Described,
        {f.name: description[f.name] for f in fields(_Described) if f.name in description},
        str(path.with_suffix(".json")),
    )
    try:
        tensors = load_file(path)
        _require_floats(tensors)
        if known.tensors and known.tensors != _hash_of(path.read_bytes()):
            raise AttackPlaneError("the tensors are not those that the description is of")
        return Directions(
            model=known.model,
            estimator=known.estimator,
            sample_counts=known.sample_counts,
            settings=known.settings,
            statistics={
                n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
            },
            **{n: tensors[n] for n in Directions.TENSORS},  # type: ignore[arg-type]
        )
    except (OSError, KeyError, SafetensorError, AttackPlaneError) as error:
        raise AttackPlaneError(
            "the directions cannot be read",
            where=path,
            got=" ".join(str(error).split())[:300],
            remedy=remedy,
        ) from error


@dataclass(frozen=True)
class _Described:
    """What must stand in the JSON beside the tensors; ``tensors`` is their hash."""

    model: str
    estimator: str
    sample_counts: dict[str, int]
    settings: Row
    tensors: str = ""


def _require_floats(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AttackPlaneError(f"{name} is of {tensor.dtype}")


def _hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
