"""What a suffix is compared with: the plain request, the initial suffix, a random suffix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from attacks.registry import ATTACKS, Attack
from attacks.result import AttackResult, scored_result, suffix_result
from attacks.slot import SuffixConfig, SuffixSlot, slot_for
from attacks.workbench import Task, Workbench
from core.errors import AttackPlaneError
from core.records import INITIAL_SUFFIX, PLAIN, RANDOM_SUFFIX, stream_seed
from core.rows import Row
from core.settings import check_settings, setting

if TYPE_CHECKING:  # attacks are listed, and their options shown, without torch
    import torch

SUFFIX_BASELINES = "baselines"


def random_suffix(
    slot: SuffixSlot, allowed: torch.Tensor, generator: torch.Generator, *, rounds: int = 20
) -> list[int]:
    """Uniform random allowed tokens, as many as the initial suffix has, that keep token fidelity.

    Whole random suffixes seldom survive tokenisation, so it starts from the initial one and
    replaces the positions in random order, each by the first of 64 uniform draws that keeps
    fidelity; positions where none did get further rounds.
    """
    import torch

    ids = torch.nonzero(allowed)[:, 0]
    suffix = list(slot.initial_ids)
    waiting = torch.randperm(len(suffix), generator=generator).tolist()
    for _ in range(rounds):
        again = []
        for position in waiting:
            drawn = ids[torch.randint(len(ids), (64,), generator=generator)].tolist()
            tries = [[*suffix[:position], token, *suffix[position + 1 :]] for token in drawn]
            faithful = slot.faithful(tries)
            if any(faithful):
                suffix = tries[faithful.index(True)]
            else:
                again.append(position)
        waiting = again
        if not waiting:
            return suffix
    raise AttackPlaneError(
        "found no random suffix that keeps its tokens",
        where=slot.renderer.loaded.spec,
        got=f"{len(waiting)} of {len(suffix)} positions left after {rounds} rounds",
        remedy="leave the baselines out, or choose another init_suffix",
    )


def baseline_suffixes(
    slot: SuffixSlot, allowed: torch.Tensor, generator: torch.Generator, names: Sequence[str]
) -> Iterator[tuple[str, list[int] | None]]:
    """(name, suffix ids or None) of each named baseline."""
    for name in names:
        if name == RANDOM_SUFFIX:
            yield name, random_suffix(slot, allowed, generator)
        else:
            yield name, list(slot.initial_ids) if name == INITIAL_SUFFIX else None


@dataclass(frozen=True)
class SuffixBaselinesConfig(SuffixConfig):
    """Which baselines of a suffix attack, with the settings of the attack's own suffix."""

    names: tuple[str, ...] = setting(
        (PLAIN, INITIAL_SUFFIX, RANDOM_SUFFIX),
        "Which baselines.",
        choices=(PLAIN, INITIAL_SUFFIX, RANDOM_SUFFIX),
    )

    def __post_init__(self) -> None:
        check_settings(self, SUFFIX_BASELINES)


def run(bench: Workbench, task: Task, config: SuffixBaselinesConfig) -> Iterator[AttackResult]:
    """The chosen baselines of one request, scored on the source model."""
    import torch

    slot = slot_for(bench.renderer, task.behaviour, config)
    seed = stream_seed(bench.seed, task.behaviour.behaviour_id, "random suffix")
    generator = torch.Generator().manual_seed(seed)
    allowed = bench.allowed(ascii_only=config.ascii_only)
    system = config.system_prompt
    for name, suffix_ids in baseline_suffixes(slot, allowed, generator, config.names):
        if suffix_ids is None:
            request = task.behaviour.request
            yield scored_result(bench.renderer, task.behaviour, name, request, system=system)
        else:
            yield suffix_result(slot, task.behaviour, name, suffix_ids, system=system)


def identity(bench: Workbench, config: SuffixBaselinesConfig, name: str) -> Row:
    """The plain request depends on the system prompt alone, whatever suffixes stand beside it."""
    values = asdict(config)
    del values["names"]
    return {"system_prompt": config.system_prompt} if name == PLAIN else values


ATTACKS.add(
    Attack(
        name=SUFFIX_BASELINES,
        summary="What a suffix is compared with: plain request, initial and random suffix.",
        config=SuffixBaselinesConfig,
        run=run,
        cost=lambda config, count, speed: count * len(config.names) * 40 * speed.token,
        sources="one",
        needs_target=True,
        keys=lambda config, behaviour, bench: [(name, None) for name in config.names],
        identity=identity,
        command=False,
    )
)
