"""Which claims can be measured. A claim is one file of this package, or of a plugin:

    CLAIMS.add(ClaimTest(number=2, title="...", measure=measure))

``measure(evidence)`` measures it on one model and returns a ``study.verdicts.Claim``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.errors import NothingToMeasure
from core.registry import Registry
from study.claims.evidence import Evidence
from study.verdicts import Check, Claim

NEEDS = (
    "attacks",
    "responses",
    "ablations",
    "controls of R",
    "controls of H",
    "additions",
    "judgements",
)
"""What takes time: replies to attacked prompts and the plane, response-side contrasts, ablations on
held-out prompts and their searched controls, additions with theirs, and the model's own judgements
under steering."""


@dataclass(frozen=True)
class ClaimTest:
    """``needs``: which of ``NEEDS`` it looks at; the plan of a run estimates their time."""

    number: int
    title: str
    measure: Callable[[Evidence], Claim]
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.needs) - set(NEEDS):
            raise ValueError(f"claim {self.number} needs {unknown}; there are {', '.join(NEEDS)}")

    @property
    def needs_attacks(self) -> bool:
        """Whether it is about attacked prompts, their replies and the plane."""
        return "attacks" in self.needs

    def on(self, evidence: Evidence) -> Claim:
        """The claim on one model; held back where that lacks what is to be measured."""
        try:
            return self.measure(evidence)
        except NothingToMeasure as error:
            return self.claim(evidence, (), held_back=[str(error)])

    @property
    def name(self) -> str:
        return str(self.number)

    def claim(
        self,
        evidence: Evidence,
        checks: tuple[Check, ...],
        note: str = "",
        held_back: Iterable[str] = (),
    ) -> Claim:
        """The claim on the evidence's model, with what was measured.

        ``held_back``: why the claim cannot be decided on this model.
        """
        model = evidence.study.spec
        return Claim(self.number, self.title, model, checks, note, tuple(held_back))


CLAIMS: Registry[ClaimTest] = Registry("claim", "study.claims")
