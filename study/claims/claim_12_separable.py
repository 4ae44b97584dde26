"""Claim 12: attack classes occupy separable regions of the plane.

The attack classes of one target in its own frame, without baselines: plain requests, initial and
random suffixes, and seed prompts are no attacks. A wrapper's constant ending decides t_inst, so a
class would be told from others by its last words. What decides is read at t_goal, less the same
wrapper's point with a harmless request in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from core.errors import AttackPlaneError
from core.readings import PlanePoint
from core.records import BASELINES
from geometry.plane import project
from geometry.separability import separability
from study.claims.evidence import Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import Check, Claim, p_check

DRAWS = 999


def measure(evidence: Evidence) -> Claim:
    inst = [p for p in evidence.points if p.attack not in BASELINES]
    goal = [replace(p, x=p.x_t_goal) for p in inst if p.x_t_goal is not None]
    checks = []
    try:
        checks.append(
            _check("at t_goal, less a harmless request in the same wrapper", _less(evidence, goal))
        )
    except AttackPlaneError as error:
        return TEST.claim(evidence, (), held_back=[str(error)])
    checks += [_check("at t_goal", goal), _check("at t_inst", inst)]
    if checks[0] is None:
        why = "fewer than two attack classes or three behaviours on the plane"
        return TEST.claim(evidence, (), held_back=[why])
    decides, *told = [c for c in checks if c]
    return TEST.claim(evidence, (decides, *(c.told() for c in told)), "one classifier per line")


def _less(evidence: Evidence, points: Sequence[PlanePoint]) -> list[PlanePoint]:
    """The points of attacks with a counterpart, less where it lies."""
    pairs, directions = evidence.wrapped, evidence.study.directions
    layer = points[0].layer if points else 0
    x, _ = project(
        pairs.counterpart["t_goal"][:, layer],
        directions.harmfulness[layer],
        directions.harmless_t_inst[layer],
    )
    y, _ = project(
        pairs.counterpart["t_post_inst"][:, layer],
        directions.refusal[layer],
        directions.harmless_t_post_inst[layer],
    )
    there = {a.artifact_id: (float(x[i]), float(y[i])) for i, a in enumerate(pairs.artifacts)}
    return [
        replace(p, x=p.x - there[p.prompt_id][0], y=p.y - there[p.prompt_id][1])
        for p in points
        if p.prompt_id in there
    ]


def _check(name: str, points: Sequence[PlanePoint]) -> Check | None:
    r = separability(points, draws=DRAWS)
    if r is None:
        return None
    return p_check(
        f"held-out accuracy of telling classes apart, {name}",
        r["accuracy"],
        r["interval"],
        r["p"],
        r["p_below"],
        f"{DRAWS} permutations within behaviours",
        unit="share",
        n=r["behaviours"],
        threshold=r["null_mean"],
        nulls={"permuted_95": r["null_95"], "chance": r["chance"]},
    )


TEST = CLAIMS.add(
    ClaimTest(
        number=12,
        title="Attack classes occupy separable regions of the plane",
        measure=measure,
        needs_attacks=True,
    )
)
