"""Replays on one target as a log of Inspect (inspect.aisi.org.uk), which its viewer opens.

One sample is one reply: the prompt as input, what every judge said as scores, and where the prompt
comes from as metadata. The reply itself is left out, as in every export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from core.records import AttackArtifact, Behaviour, Replay
from core.rows import Row

VERSION = 2
"""Of Inspect's log format."""
SUCCESS = "jailbroken"
"""The score that says what the first judge decided."""


def inspect_log(
    replays: Sequence[Replay],
    artifacts: Mapping[str, AttackArtifact],
    behaviours: Mapping[str, Behaviour],
    *,
    settings: Row,
) -> str:
    """The log of all replies of one target.

    Args:
        replays: of one target; at least one.
        artifacts, behaviours: by their ids.
        settings: of the transfer stage.
    """
    now = datetime.now(UTC).isoformat()
    target = replays[0].target_model
    rows = [_sample(r, artifacts[r.artifact_id], behaviours.get(r.behaviour_id)) for r in replays]
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    ids = list(dict.fromkeys(row["id"] for row in rows))
    identity = replays[0].config_hash
    log: Row = {
        "version": VERSION,
        "status": "success",
        "eval": {
            "eval_id": identity,
            "run_id": identity,
            "task_id": identity,
            "created": now,
            "task": "attack_plane_transfer",
            "task_args": settings,
            "dataset": {"name": "attack_plane", "samples": len(ids), "sample_ids": ids},
            "model": f"attack_plane/{target}",
            "config": {"epochs": 1 + max(r.sample for r in replays)},
            "packages": {},
            "scorers": [{"name": name} for name in names],
        },
        "plan": {"name": "replay", "steps": [{"solver": "replay", "params": settings}]},
        "results": {
            "total_samples": len(rows),
            "completed_samples": len(rows),
            "scores": [_result(name, rows) for name in names],
        },
        "stats": {"started_at": now, "completed_at": now},
        "samples": rows,
    }
    return json.dumps(log, ensure_ascii=False, indent=1) + "\n"


def _sample(replay: Replay, artifact: AttackArtifact, behaviour: Behaviour | None) -> Row:
    system = [{"role": "system", "content": artifact.system_prompt}]
    prompt = [{"role": "user", "content": artifact.prompt}]
    said = {SUCCESS: replay.jailbroken, **replay.judgements}
    return {
        "id": artifact.artifact_id,
        "epoch": replay.sample + 1,
        "input": (system if artifact.system_prompt else []) + prompt,
        "target": artifact.target_string or "",
        "messages": [],
        "output": {"model": replay.target_model, "choices": []},
        "scores": {k: {"value": float(v)} for k, v in said.items() if v is not None},
        "metadata": {
            "behaviour_id": replay.behaviour_id,
            "request": artifact.request,
            "label": behaviour.label if behaviour else None,
            "attack": replay.attack,
            "variant": artifact.variant,
            "source_model": replay.source_model,
            "outcome": replay.outcome,
            "d": replay.d,
            "sent_as_meant": replay.certificate.get("sent_as_meant"),
        },
    }


def _result(name: str, rows: Sequence[Row]) -> Row:
    """The mean of one score over the replies that have it."""
    values = [row["scores"][name]["value"] for row in rows if name in row["scores"]]
    mean = {"name": "mean", "value": sum(values) / len(values)}
    return {
        "name": name,
        "scorer": name,
        "scored_samples": len(values),
        "unscored_samples": len(rows) - len(values),
        "metrics": {"mean": mean},
    }
