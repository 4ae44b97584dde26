"""Which claims can be measured. A claim is one file of this package, or of a plugin:

    CLAIMS.add(ClaimTest(number=2, title="...", measure=measure))

``measure(evidence)`` measures it on one model and returns a ``study.verdicts.Claim``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.registry import Registry
from study.claims.evidence import Evidence
from study.verdicts import Check, Claim


@dataclass(frozen=True)
class ClaimTest:
    """``needs_attacks``: whether it is about attacked prompts, their replies and the plane."""

    number: int
    title: str
    measure: Callable[[Evidence], Claim]
    needs_attacks: bool = False

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
