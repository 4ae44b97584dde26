"""The request alone: what prompt-level attacks are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attacks.registry import ATTACKS, Attack
from attacks.result import AttackResult, prompt_result
from core.records import PLAIN
from core.settings import setting

if TYPE_CHECKING:
    from attacks.workbench import Task, Workbench


@dataclass(frozen=True)
class PlainConfig:
    system_prompt: str | None = setting(None, "System prompt.", flag="--system")


def run_plain(bench: Workbench, task: Task, config: PlainConfig) -> Iterator[AttackResult]:
    """The request alone, for attacks without a source model."""
    request = task.behaviour.request
    yield prompt_result(task.behaviour, PLAIN, request, system=config.system_prompt)


ATTACKS.add(
    Attack(
        name=PLAIN,
        summary="The request alone: what prompt-level attacks are compared with.",
        config=PlainConfig,
        run=run_plain,
        command=False,
    )
)
