"""Which candidate of a step becomes the current suffix.

GCG takes the lowest exact loss of all; ``attacks/screening.py`` finds it sooner. The rules here are
not GCG. Each is off by default and changes the search, not the losses: whatever is taken was scored
exactly.

draft   probe sampling (arXiv 2403.01251, algorithm 1): all candidates on a draft model, a random
        sixteenth of them exactly; the Spearman correlation rho of the two on that probe set says
        how many of the draft's best are scored exactly: (1 - alpha) B / 8 with alpha = (1 + rho) /
        2.
merge   multi-coordinate updating (I-GCG, arXiv 2405.21018, section 3.3): the best ``merge``
        candidates are merged one after another, the replacements of the first k into one suffix for
        k = 1..merge; the lowest loss of these is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.protocols import SuffixLoss, SuffixPlace
from attacks.screening import Screening
from core.statistics import spearman

PROBE_SHARE = 16
FILTER_SHARE = 8
"""The paper's choices: probe set B / 16, reduction R = 8."""


def probe_sampled(
    objective: SuffixLoss, draft: SuffixLoss, candidates: Tensor, generator: torch.Generator
) -> Tensor:
    """Probe set and the draft's best: what is worth an exact score."""
    probe = torch.randperm(len(candidates), generator=generator)[
        : max(2, len(candidates) // PROBE_SHARE)
    ]
    drafted = draft.losses(candidates)
    exact = objective.losses(candidates[probe])
    agreement = (1 + spearman(drafted[probe].tolist(), exact.tolist())) / 2
    filtered = max(1, min(len(candidates), int((1 - agreement) * len(candidates) / FILTER_SHARE)))
    chosen = torch.cat([probe, drafted.topk(filtered, largest=False).indices]).unique()
    return candidates[chosen]


def merged(suffix: Tensor, best: Tensor) -> Tensor:
    """(k, suffix length) single candidates, best first -> (k, suffix length): the replacements of
    the first 1..k together.

    Where two replace the same position, the better one keeps it (in the authors' code the later one
    takes it).
    """
    current, rows = suffix.clone(), []
    for candidate in best:
        current = torch.where((candidate != suffix) & (current == suffix), candidate, current)
        rows.append(current)
    return torch.stack(rows)


def choose(
    objective: SuffixLoss,
    slot: SuffixPlace,
    suffix: Tensor,
    candidates: Tensor,
    *,
    screening: Screening | None,
    merge: int,
    draft: SuffixLoss | None,
    generator: torch.Generator,
) -> tuple[list[int], float]:
    """The next suffix and its exact loss. With no option: the candidate with the lowest loss.

    ``screening``: how that candidate is found without scoring all of them exactly.
    """
    if draft is not None:
        draft.share(suffix)
        candidates, screening = probe_sampled(objective, draft, candidates, generator), None
    if screening is not None:
        lowest = screening.lowest(objective, candidates, max(1, merge))
        if not merge:
            winner, loss = lowest[0]
            return candidates[winner].tolist(), loss
        candidates = candidates[[index for index, _ in lowest]]  # best first
    elif merge:
        candidates = candidates[objective.losses(candidates).argsort()[:merge]]
    if merge:
        together = merged(suffix.cpu(), candidates)  # the first is the best single one
        candidates = together[torch.tensor(slot.faithful(together.tolist()), dtype=torch.bool)]
    winner, loss = objective.best(candidates)
    return candidates[winner].tolist(), loss
