"""Whether a model can be decoded by ``core/decoding.py``: found by comparing with plain passes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from core.decoding import TOLERANCE, RowDecoder
from core.head import head_of
from core.models import LoadedModel
from core.prefix import keeps_keys_and_values_only

log = logging.getLogger(__name__)
KEPT = "_attack_plane_decodes"
"""Where a model keeps whether it can be decoded here."""


def decodes(loaded: LoadedModel, prompt: Sequence[int]) -> bool:
    """Whether this model can be decoded by ``RowDecoder``; found once.

    The logits of two tokens after ``prompt``, which is decoded twice, are compared.
    """
    known: bool | None = vars(loaded).get(KEPT)
    if known is None:
        known = vars(loaded)[KEPT] = _agrees(loaded, list(prompt))
    return known


def _agrees(loaded: LoadedModel, prompt: list[int]) -> bool:
    if not keeps_keys_and_values_only(loaded) or len(prompt) < 2:
        return False
    ids = torch.tensor(prompt, device=loaded.device)
    head = head_of(loaded, ids)
    if not head.usable:
        return False
    half = len(prompt) // 2
    decoder = RowDecoder(loaded, head, prompt[:half], stops=(), max_new_tokens=2)
    decoder.logits = []
    try:
        reply, _ = dict(decoder.replies({0: prompt[half:], 1: prompt[half:]})).values()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        log.warning("%s: decoded by transformers (%s)", loaded.spec, type(error).__name__)
        return False
    whole = torch.cat([ids, ids.new_tensor(reply[:1])])[None]
    with torch.no_grad():
        plain = loaded.last_logits(2, input_ids=whole, use_cache=False)[0]
    worst = float((torch.stack(decoder.logits, 1) - plain).abs().max())
    limit = TOLERANCE[loaded.dtype] * float(plain.abs().max())
    if worst > limit:
        log.warning("%s: decoded by transformers (logits differ by %.2g)", loaded.spec, worst)
    return worst <= limit
