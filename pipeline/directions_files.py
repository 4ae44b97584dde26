"""Save and load directions: tensors as safetensors, everything else as JSON beside them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from core.errors import AttackPlaneError
from core.files import read_object, write_atomically
from core.readings import Directions
from core.records import require_version
from core.specs import canonical_name


def directions_path(folder: Path, model: str, estimator: str) -> Path:
    return folder / "directions" / f"{canonical_name(model)}.{estimator}.safetensors"


def save_directions(directions: Directions, folder: Path, extra: dict[str, object]) -> Path:
    """Write ``directions/MODEL.ESTIMATOR.safetensors`` and its JSON; returns the tensors' path."""
    path = directions_path(folder, directions.model, directions.estimator)
    tensors: dict[str, Tensor] = {n: getattr(directions, n) for n in Directions.TENSORS}
    tensors |= {f"statistics.{n}": t for n, t in directions.statistics.items()}
    write_atomically(path, save({n: t.contiguous() for n, t in tensors.items()}))
    description = {
        "schema_version": directions.schema_version,
        "model": directions.model,
        "estimator": directions.estimator,
        "sample_counts": directions.sample_counts,
        "settings": directions.settings,
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
    try:
        tensors = load_file(path)
        return Directions(
            model=description["model"],
            estimator=description["estimator"],
            sample_counts=description["sample_counts"],
            settings=description["settings"],
            statistics={
                n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
            },
            **{n: tensors[n] for n in Directions.TENSORS},  # type: ignore[arg-type]
        )
    except (OSError, KeyError, SafetensorError) as error:
        raise AttackPlaneError(
            "the directions cannot be read",
            where=path,
            got=f"{type(error).__name__}: {error}",
            remedy=remedy,
        ) from error
