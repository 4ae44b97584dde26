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
from core.store import ATTACKS, RunFolder
from pipeline.matrices import require_whole
from pipeline.runs import artifacts_of

Verified = tuple[AttackArtifact, Verification | None]


def verify(
    path: Path, tolerance: float, *, open_model: OpenModel = ModelHandle
) -> Iterator[Verified]:
    """Check every artifact of a run, source model by source model.

    None for those that claim nothing to check: prompts without a loss (prompt-level attacks), and
    imported ones whose source is no model spec of ours.
    """
    run = RunFolder.existing(path)
    require_whole(run)
    artifacts = artifacts_of(run)
    if not artifacts:
        raise AttackPlaneError("no artifacts to verify in this run", where=path / ATTACKS)
    recorded = run.manifest["models"]
    pairs = [(spec, a) for a in artifacts for spec in a.source_model.split(SEVERAL_SOURCES)]
    for source in dict.fromkeys(spec for spec, _ in pairs):
        checked = []
        for spec, artifact in pairs:
            if spec == source:
                foreign = artifact.provenance.get("format") and source not in recorded
                if artifact.loss is None or foreign:
                    yield artifact, None
                else:
                    checked.append(artifact)
        if checked:
            yield from _verify_on(open_model(source), checked, recorded, tolerance)


def _verify_on(
    model: ModelHandle, artifacts: list[AttackArtifact], recorded: dict[str, str], tolerance: float
) -> Iterator[Verified]:
    """Check artifacts on their source model, which must be the run's."""
    known = recorded.get(model.spec, model.fingerprint)
    if known != model.fingerprint:
        raise AttackPlaneError(
            "the source model is not the one of the run (other files or precision)",
            where=model.spec,
            got=f"{known} in the run, now {model.fingerprint}",
            remedy="name the precision in the spec (?dtype=...), the same on every device",
        )
    renderer = Renderer(model.loaded)
    for artifact in artifacts:
        own = artifact.provenance.get("losses", {}).get(model.spec, artifact.loss)
        claim = replace(artifact, loss=own)
        yield artifact, verify_artifact(renderer, claim, tolerance=tolerance)
