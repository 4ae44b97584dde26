"""Every attacked request gets its plain request: what gains and displacements are measured from.

A plain request stands for one request under one system prompt. Attacks with a source model make
theirs on it, since its loss is wanted. Where a run lacks one (prompt-level attacks, imports, runs
of earlier versions) it is added here, without a source.
"""

from __future__ import annotations

from collections.abc import Sequence

from attacks.plain import PlainConfig
from attacks.registry import ATTACKS
from attacks.result import prompt_result
from attacks.workbench import Workbench
from core.records import PLAIN, Behaviour
from core.store import ATTACKS as ATTACKS_FILE
from core.store import RunFolder
from pipeline.campaign import Cells, Plan
from pipeline.runs import artifacts_of


def add_plain_requests(
    run: RunFolder, behaviours: Sequence[Behaviour] = (), system_prompt: str | None = None
) -> int:
    """Append the plain requests that the run lacks; returns how many those are.

    They are those of its artifacts, and those of ``behaviours`` under ``system_prompt``. Use within
    the run's lock.
    """
    artifacts = artifacts_of(run)
    run.note_behaviours(behaviours)
    known = run.behaviours()
    wanted = {(a.behaviour_id, a.request, a.system_prompt): None for a in artifacts}
    wanted |= {(b.behaviour_id, b.request, system_prompt): None for b in behaviours}
    have = {(a.behaviour_id, a.request, a.system_prompt) for a in artifacts if a.attack == PLAIN}
    missing = [key for key in wanted if key not in have and key[0] in known]
    for behaviour_id, request, system in missing:
        behaviour = known[behaviour_id]
        cells = Cells(run, Plan(ATTACKS.get(PLAIN), PlainConfig(system)), Workbench())
        artifact = cells.artifact_of(
            behaviour, prompt_result(behaviour, PLAIN, request, system=system)
        )
        run.append(ATTACKS_FILE, artifact.to_row())
    return len(missing)
