"""How coupled harmfulness and refusal are, and how far they drift [SG 2606.16349, RG 2604.27019].

C_cos    cos(h, r), signed, of the two best carriers
C_sub    (1/k) sum of cos^2 of the principal angles of two k-dimensional subspaces, with k = 3.
         Random subspaces have k/d.
C_layer  exp(-|L_h - L_r| / 4)
HRCI v1  0.4 C_cos + 0.4 C_sub + 0.2 C_layer
HRCI v2  0.5 C_cos + 0.5 C_sub

effective rank  exp(-sum q log q), with q = sigma^2 / sum sigma^2. The rows of the matrix are the
                directions of all positions and layers. It is given for the rows as they are, and
                for rows of unit length: otherwise the long differences of late layers decide it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from geometry.contrasts import unit

SUBSPACE = 3


def subspace(rows: Tensor, k: int = SUBSPACE) -> Tensor:
    """(n, d_model) -> (k, d_model): the leading right singular vectors of the unit-length rows."""
    kept = rows[rows.norm(dim=-1) > 0].double()
    if len(kept) < k:
        raise AttackPlaneError(
            "too few directions for a subspace", got=len(kept), remedy=f"at least {k}"
        )
    kept = unit(kept)
    if len(kept) > kept.shape[1]:
        return torch.linalg.svd(kept, full_matrices=False).Vh[:k]
    # a quarter of the time of an SVD: the leading eigenvectors u of the Gram matrix give u^T rows
    leading = torch.linalg.eigh(kept @ kept.T).eigenvectors[:, -k:].flip(1)
    return torch.linalg.qr((leading.T @ kept).T).Q.T


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the principal angles of two subspaces, largest first.

    (k, d) and (l, d), each with orthonormal rows -> (min(k, l),)
    """
    return torch.linalg.svdvals(a.double() @ b.double().T).clamp(0, 1)


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """C_sub of two subspaces given by orthonormal rows."""
    return float((principal_cosines(a, b) ** 2).mean())


def layer_closeness(first: int, second: int) -> float:
    """C_layer."""
    return math.exp(-abs(first - second) / 4)


def hrci(c_cos: float, c_sub: float, c_layer: float | None = None) -> float:
    """HRCI version 1 with ``c_layer``, version 2 without it."""
    if c_layer is None:
        return 0.5 * c_cos + 0.5 * c_sub
    return 0.4 * c_cos + 0.4 * c_sub + 0.2 * c_layer


def effective_rank(rows: Tensor, *, normalise: bool) -> float:
    """The effective number of dimensions that ``rows`` (n, d_model) span: 1 to min(n, d_model).

    It is 0 if all rows are zero.
    """
    kept = rows[rows.norm(dim=-1) > 0].double()
    if not len(kept):
        return 0.0
    kept = unit(kept) if normalise else kept
    gram = kept @ kept.T if len(kept) <= kept.shape[1] else kept.T @ kept
    power = torch.linalg.eigvalsh(gram).clamp_min(0)  # squared singular values
    q = power / power.sum()
    return float(torch.exp(-(q * q.clamp_min(1e-300).log()).sum()))


def random_pair(
    d_model: int, generator: torch.Generator, *, k: int = SUBSPACE
) -> tuple[float, float]:
    """Signed cosine of two random directions, and C_sub of two random subspaces."""
    a, b = unit(torch.randn(2, d_model, generator=generator))
    frames = torch.linalg.qr(torch.randn(2, d_model, k, generator=generator)).Q
    return float(a @ b), float((frames[0].T @ frames[1]).square().sum() / k)
