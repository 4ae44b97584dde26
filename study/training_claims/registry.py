"""Which claims about trainings can be measured. A claim is one file here, or of a plugin:

    TRAINING_CLAIMS.add(TrainingTest(number=9, title="...", measure=measure, needs=("C_cos",)))

``measure(training, trainings)`` measures it on one training and returns its checks. It may look at
the other trainings of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from core.errors import NothingToMeasure
from core.registry import Registry
from study.training_claims.evidence import Training, Trainings
from study.verdicts import Check, Claim


@dataclass(frozen=True)
class TrainingTest:
    """
    Attributes:
        measure: training, all trainings -> its checks.
        needs: what it looks at, in words.
        arms: which trainings it is about; all without any.
        note: what the reader must know.
        any_of: whether one of the checks is enough.
        without: settings of the arm; trainings where one is not the paper's are controls, and are
            left out.
    """

    number: int
    title: str
    measure: Callable[[Training, Trainings], Sequence[Check]]
    needs: str
    arms: tuple[str, ...] = ()
    note: str = ""
    any_of: bool = False
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.number)

    def about(self, training: Training) -> bool:
        """Whether the claim speaks of this training."""
        changed = {item.partition("=")[0] for item in training.variant}
        return (not self.arms or training.arm in self.arms) and not changed & set(self.without)

    def on(self, training: Training, trainings: Trainings) -> Claim:
        """The claim on one training; held back where that lacks what is to be measured."""
        try:
            checks = tuple(self.measure(training, trainings))
        except NothingToMeasure as error:
            why = (str(error).replace("\n", ";"),)
            return Claim(self.number, self.title, training.name, (), self.note, why)
        claim = Claim(self.number, self.title, training.name, checks, self.note)
        return replace(claim, any_of=self.any_of)


TRAINING_CLAIMS: Registry[TrainingTest] = Registry("claim", "study.training_claims")
