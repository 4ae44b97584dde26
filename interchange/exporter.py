"""Artifacts in other tools' forms. Replies are never exported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from core.errors import AttackPlaneError
from core.records import AttackArtifact, Behaviour
from core.rows import Row


def without_system_prompts(artifacts: Sequence[AttackArtifact]) -> None:
    """Neither format holds a system prompt: exported without it, a prompt would be another one."""
    with_system = [a for a in artifacts if a.system_prompt]
    if with_system:
        raise AttackPlaneError(
            "this format holds no system prompt, and these prompts have one",
            got=f"{len(with_system)} of {len(artifacts)}, first {with_system[0].artifact_id}",
            remedy="export an attack that was made without a system prompt",
        )


def harmbench(artifacts: Sequence[AttackArtifact]) -> str:
    """HarmBench test cases: {behaviour id: [prompt, ...]}."""
    without_system_prompts(artifacts)
    cases: dict[str, list[str]] = {}
    for artifact in artifacts:
        cases.setdefault(artifact.behaviour_id, []).append(artifact.prompt)
    return json.dumps(cases, indent=2, ensure_ascii=False) + "\n"


def jailbreakbench(
    artifacts: Sequence[AttackArtifact],
    behaviours: Mapping[str, Behaviour],
    verdicts: Mapping[str, bool | None],
    *,
    target: str | None,
) -> str:
    """A JailbreakBench artifact file: one attack on one model, one prompt per behaviour or null.

    Args:
        behaviours: those that were attacked; each gets an entry.
        verdicts: jailbroken by artifact id, on ``target`` (default: the source model).

    Raises:
        AttackPlaneError: artifacts of several attacks or sources, or several of one behaviour.
    """
    without_system_prompts(artifacts)
    for name, values in (
        ("attack", {a.attack for a in artifacts}),
        ("source", {a.source_model for a in artifacts}),
    ):
        if len(values) != 1:
            raise AttackPlaneError(
                f"a JailbreakBench file holds one {name}",
                got=", ".join(sorted(values)) or "no artifact",
                remedy=f"choose one {name}",
            )
    by_behaviour: dict[str, AttackArtifact] = {}
    for artifact in artifacts:
        if artifact.behaviour_id in by_behaviour:
            raise AttackPlaneError(
                "a JailbreakBench file holds one prompt a behaviour",
                got=(
                    f"{artifact.behaviour_id}: variants "
                    f"{by_behaviour[artifact.behaviour_id].variant}, {artifact.variant}"
                ),
                remedy="choose one variant",
            )
        by_behaviour[artifact.behaviour_id] = artifact
    first, rows = artifacts[0], []
    for index, (name, behaviour) in enumerate(behaviours.items()):
        own = by_behaviour.get(name)
        rows.append(
            {
                "index": index,
                "goal": behaviour.request,
                "behavior": name,
                "category": behaviour.category,
                "prompt": own.prompt if own else None,
                "response": None,
                "number_of_queries": None,
                "queries_to_jailbreak": None,
                "prompt_tokens": None,
                "response_tokens": None,
                "jailbroken": verdicts.get(own.artifact_id) if own else False,  # null: not judged
            }
        )
    successes = sum(bool(verdicts.get(a.artifact_id)) for a in artifacts)
    judged = [verdicts.get(a.artifact_id) is not None for a in artifacts]
    parameters: Row = {
        "method": first.attack,
        "model": target or first.source_model,
        "attack_type": "white_box" if first.loss is not None else "black_box",
        "attack_success_rate": successes / len(rows) if all(judged) else None,
        "total_number_of_jailbreaks": successes if all(judged) else None,
        "number_of_submitted_prompts": len(artifacts),
        "method_parameters": {"source_model": first.source_model, "config_hash": first.config_hash},
    }
    return (
        json.dumps({"parameters": parameters, "jailbreaks": rows}, indent=2, ensure_ascii=False)
        + "\n"
    )
