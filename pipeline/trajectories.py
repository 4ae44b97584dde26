"""Where the prompts that were the best in turn lie, step by step of their optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.errors import AttackPlaneError
from core.prompt import Conversation, Prompt, Renderer
from core.readings import Directions
from core.records import AttackArtifact
from core.rows import Row
from geometry.activations import collect
from geometry.plane import project

SNAPSHOTS = 12
"""Most prompts of one optimisation that are projected."""


def _chosen(artifacts: Sequence[AttackArtifact]) -> list[tuple[AttackArtifact, Row]]:
    """At most ``SNAPSHOTS`` of each artifact's snapshots, evenly spaced."""
    chosen = []
    for a in artifacts:
        last = len(a.snapshots) - 1
        evenly = {round(i * last / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)}
        chosen += [(a, a.snapshots[i]) for i in sorted(evenly)] if last > 0 else []
    return chosen


def trajectory_rows(
    renderer: Renderer,
    artifacts: Sequence[AttackArtifact],
    frames: Mapping[str, Directions],
    layer: int,
) -> list[Row]:
    """One row per snapshot and frame: step, loss, and its place (x, y) on the plane."""
    prompts: list[Prompt] = []
    snapshots = []
    for a, snapshot in _chosen(artifacts):
        conversation = Conversation(snapshot["prompt"], system=a.system_prompt)
        try:
            prompts.append(renderer.render(conversation, allow_trim=True))
        except AttackPlaneError:
            continue  # the artifact's own prompt was refused too, and told
        snapshots.append((a, snapshot))
    if not snapshots:
        return []
    activations = collect(
        renderer.loaded,
        prompts,
        [f"{a.artifact_id} {s['step']}" for a, s in snapshots],
        positions=("t_inst", "t_post_inst"),
        layers=[layer],
        description="trajectories",
    )
    at_inst, at_post = (activations.of(layer, where) for where in ("t_inst", "t_post_inst"))
    rows = []
    for name, d in frames.items():
        x, _ = project(at_inst, d.harmfulness[layer], d.harmless_t_inst[layer])
        y, _ = project(at_post, d.refusal[layer], d.harmless_t_post_inst[layer])
        rows += [
            {
                "artifact_id": a.artifact_id,
                "behaviour_id": a.behaviour_id,
                "attack": a.attack,
                "source": a.source_model,
                "target": renderer.loaded.spec,
                "frame": name,
                "layer": layer,
                "step": s["step"],
                "loss": a.loss_history[s["step"]],
                "x": float(x[i]),
                "y": float(y[i]),
            }
            for i, (a, s) in enumerate(snapshots)
        ]
    return rows
