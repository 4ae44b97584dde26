"""Losses of training, as pure functions of tensors.

    reply loss = - (1 / N) sum over labelled tokens of log p(token | what stands before it)

in nats per reply token; N is the number of labelled tokens in the batch.
"""

from __future__ import annotations

from torch import Tensor, nn


def reply_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over labelled tokens, in nats.

    ``logits`` (batch, positions, vocabulary) predict ``labels`` (batch, positions); a label of -100
    is left out.
    """
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100
    )


def predicting_positions(labels: Tensor) -> Tensor:
    """(batch, tokens) labels -> positions that predict a labelled token in some row.

    The head is applied there alone: over the whole vocabulary it is a fifth of a step.
    """
    return (labels[:, 1:] != -100).any(0).nonzero()[:, 0]
