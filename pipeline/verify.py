"""Every artifact of a run, rendered and scored anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from attacks.verify import Verification, verify_artifact
from core.errors import AttackPlaneError
from core.models import ModelHandle, OpenModel
from core.prompt import Renderer
from core.records import SEVERAL_SOURCES, AttackArtifact
from core.rows import Row
from core.store import ATTACKS, RunFolder
from pipeline.matrices import require_whole
from pipeline.runs import each_artifact

Verified = tuple[AttackArtifact, Verification | None]


def verify(
    path: Path, tolerance: float, *, open_model: OpenModel = ModelHandle
) -> Iterator[Verified]:
    """Check every artifact of a run, source model by source model; rows are not held.

    None for those that claim nothing to check: prompts without a loss (prompt-level attacks), and
    imported ones whose source is no model spec of ours.
    """
    run = RunFolder.existing(path)
    require_whole(run)
    sources = dict.fromkeys(spec for a in each_artifact(run) for spec in _sources(a))
    if not sources:
        raise AttackPlaneError("no artifacts to verify in this run", where=path / ATTACKS)
    recorded = run.manifest["models"]
    for source in sources:
        own = (a for a in each_artifact(run) if source in _sources(a))
        yield from _on(source, own, recorded, tolerance, open_model)


def _on(
    source: str,
    artifacts: Iterator[AttackArtifact],
    recorded: Row,
    tolerance: float,
    open_model: OpenModel,
) -> Iterator[Verified]:
    """Check artifacts on one source model, which is loaded for the first that claims something."""
    model: ModelHandle | None = None
    for artifact in artifacts:
        foreign = artifact.provenance.get("format") and source not in recorded
        if artifact.loss is None or foreign:
            yield artifact, None
            continue
        if model is None:
            model = _the_runs(open_model(source), recorded)
            renderer = Renderer(model.loaded)
        claimed = artifact.provenance.get("losses", {}).get(source, artifact.loss)
        claim = replace(artifact, loss=claimed)
        yield artifact, verify_artifact(renderer, claim, tolerance=tolerance)
    if model:
        model.release()


def _sources(artifact: AttackArtifact) -> list[str]:
    return artifact.source_model.split(SEVERAL_SOURCES)


def _the_runs(model: ModelHandle, recorded: Row) -> ModelHandle:
    """The model, if it is the one of the run."""
    known = recorded.get(model.spec, model.fingerprint)
    if known != model.fingerprint:
        raise AttackPlaneError(
            "the source model is not the one of the run (other files or precision)",
            where=model.spec,
            got=f"{known} in the run, now {model.fingerprint}",
            remedy="name the precision in the spec (?dtype=...), the same on every device",
        )
    return model
