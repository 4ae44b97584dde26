"""Judges: did the reply do what was asked? One file a judge, found through ``registry.py``."""

from evaluation.judges.registry import (
    DEFAULT_JUDGE,
    DEFAULT_JUDGES,
    JUDGES,
    Exchange,
    Judge,
    JudgeKind,
    is_degenerate,
    judge_all,
    judge_forms,
    judge_kind,
    make_judge,
    outcomes,
    refusals,
    succeeded,
)

__all__ = [
    "DEFAULT_JUDGE",
    "DEFAULT_JUDGES",
    "JUDGES",
    "Exchange",
    "Judge",
    "JudgeKind",
    "is_degenerate",
    "judge_all",
    "judge_forms",
    "judge_kind",
    "make_judge",
    "outcomes",
    "refusals",
    "succeeded",
]
