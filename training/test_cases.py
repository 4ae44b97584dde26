"""R2D2's pool of test cases: suffixes that GCG keeps attacking with while the model changes.

A case is a request, its affirmative target, and a suffix. Every case keeps its suffix from update
to update, so that attacks go on where they were; now and then some begin anew with another request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attacks.candidates import allowed_tokens
from attacks.gcg import GCGConfig
from attacks.gcg_search import GCGState, run_gcg
from attacks.objective import TargetLoss
from attacks.slot import Slot, SuffixSlot, default_slot
from core.errors import AttackPlaneError
from core.models import LoadedModel, evaluating
from core.prompt import Renderer
from core.records import Behaviour, stream_seed
from core.rows import Row

LIKELY = 1.0
"""Nats per target token up to which a case's target counts as likely."""
WORDS = (15, 20)
"""Fewest and most words of a new suffix [HarmBench's code]."""


@dataclass
class Case:
    """One test case. ``loss``: of its target after the last attack, nats per token."""

    behaviour: int
    words: int
    suffix: list[int]
    loss: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a case's suffix stands, as it is now.

    Without a slot every suffix counts: HarmBench trains on ids and tokenises nothing again.
    """

    initial_ids: tuple[int, ...]
    slot: SuffixSlot | None

    def faithful(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        return self.slot.faithful(suffixes) if self.slot else [True] * len(suffixes)


class Pool:
    """The cases of one training.

    Args:
        behaviours: requests with target strings.
        size: cases.
        seed: of all that is drawn.
        filtered: keep token fidelity, which HarmBench does not.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        behaviours: Sequence[Behaviour],
        size: int,
        seed: int,
        *,
        filtered: bool,
    ) -> None:
        self.loaded, self.seed, self.filtered = loaded, seed, filtered
        self.behaviours = [b for b in behaviours if b.target_string]
        if not self.behaviours:
            raise AttackPlaneError(
                "R2D2 needs harmful requests with target strings",
                where="train r2d2",
                got=f"{len(behaviours)} requests, none with a target",
                remedy="add a column target ('Sure, here is ...') to the behaviours file",
            )
        self.renderer = Renderer(loaded)
        vocabulary = loaded.embedding_table.shape[0]
        self._allowed = allowed_tokens(loaded.tokenizer, vocabulary)
        self._slots: dict[tuple[int, int], SuffixSlot] = {}
        order = self._generator("order")
        chosen = torch.randperm(len(self.behaviours), generator=order).tolist()
        self.cases = [
            self._new(chosen[i % len(chosen)], self._generator("new", 0, i)) for i in range(size)
        ]
        # chosen once, in full precision: reduced products would look like a fault of the path
        with evaluating(loaded):
            self._path = TargetLoss(loaded, self.slot(self.cases[0])).path

    def _generator(self, *names: object) -> torch.Generator:
        return torch.Generator().manual_seed(stream_seed(self.seed, "r2d2", *map(str, names)))

    def _new(self, behaviour: int, generator: torch.Generator) -> Case:
        words = int(torch.randint(WORDS[0], WORDS[1] + 1, (1,), generator=generator))
        return Case(behaviour, words, list(self._slot(behaviour, words).initial_ids))

    def _slot(self, behaviour: int, words: int) -> SuffixSlot:
        key = (behaviour, words)
        if key not in self._slots:
            b = self.behaviours[behaviour]
            assert b.target_string is not None
            self._slots[key] = default_slot(
                self.renderer,
                b.request,
                b.target_string,
                length=words,
                placement="{request} {suffix}",
                system=None,
            )
        return self._slots[key]

    def slot(self, case: Case) -> SuffixSlot:
        return self._slot(case.behaviour, case.words)

    def drawn(self, update: int, count: int) -> list[int]:
        """The cases of one update, counted from 0, each at most once."""
        order = torch.randperm(len(self.cases), generator=self._generator("draw", update))
        return order[:count].tolist()

    def attack(self, number: int, update: int, config: GCGConfig) -> None:
        """Some GCG steps on one case against the model as it is now.

        The last winner becomes the case's suffix, even where its loss is higher than before.
        """
        case = self.cases[number]
        own, suffix = self.slot(case), tuple(case.suffix)
        slot = Slot(own.before_ids, suffix, own.after_ids, own.target_ids)
        objective = TargetLoss(self.loaded, slot, path=self._path)
        seed = stream_seed(self.seed, "r2d2", str(update), str(number))
        # the loss before the first step is not needed: infinite, whatever comes next is better
        start = GCGState(
            case.suffix,
            torch.Generator().manual_seed(seed).get_state().tolist(),
            objective.batch.value,
            best_ids=case.suffix,
            losses=[math.inf],
        )
        state = run_gcg(
            objective,
            Place(suffix, own if self.filtered else None),
            config,
            self._allowed,
            seed=seed,
            state=start,
        )
        case.suffix, case.loss = state.suffix_ids, _known(state.losses[-1])

    def put(self, number: int, row: Row) -> None:
        """A case as another process, or an earlier one, left it."""
        self.cases[number] = Case(**row)

    def begin_anew(self, update: int, count: int) -> None:
        """Give ``count`` random cases new suffixes, requests and targets."""
        generator = self._generator("reset", update)
        for number in torch.randperm(len(self.cases), generator=generator)[:count].tolist():
            behaviour = int(torch.randint(len(self.behaviours), (1,), generator=generator))
            self.cases[number] = self._new(behaviour, generator)

    def summary(self) -> dict[str, float]:
        """Mean loss of the cases attacked so far, and the share whose target is likely."""
        losses = [case.loss for case in self.cases if case.loss is not None]
        count = max(1, len(losses))
        return {
            "pool_loss": sum(losses) / count,
            "pool_likely": sum(loss <= LIKELY for loss in losses) / count,
        }


def _known(loss: float) -> float | None:
    """None where no candidate was scored."""
    return loss if math.isfinite(loss) else None
