"""Judges: did the reply do what was asked? One file a judge, found through ``registry.py``."""

from core.records import COMPLIED, NEITHER, OUTCOMES, REFUSED
from evaluation.judges.registry import (
    DEFAULT_JUDGE,
    DEFAULT_JUDGES,
    JUDGES,
    QUICK_JUDGE,
    REFUSES,
    Exchange,
    Judge,
    JudgeKind,
    Judgement,
    judge_all,
    judge_forms,
    judge_kind,
    make_judge,
    outcomes,
    refusals,
    succeeded,
)

__all__ = [
    "COMPLIED",
    "DEFAULT_JUDGE",
    "DEFAULT_JUDGES",
    "JUDGES",
    "NEITHER",
    "OUTCOMES",
    "QUICK_JUDGE",
    "REFUSED",
    "REFUSES",
    "Exchange",
    "Judge",
    "JudgeKind",
    "Judgement",
    "judge_all",
    "judge_forms",
    "judge_kind",
    "make_judge",
    "outcomes",
    "refusals",
    "succeeded",
]
