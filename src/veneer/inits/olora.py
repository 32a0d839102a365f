"""OLoRA: the factors are the first r columns and rows of W's QR decomposition, and the adapter stands on the rest.

Büyükakyüz, arXiv 2406.01775.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from veneer.core.init import AbstractInit, Identity, Start, weight_of, write


@final
class Init(AbstractInit):
    """``W = Q R``: B holds the first columns of Q, which are orthonormal, A the first rows of R."""

    identity: ClassVar[Identity] = "rounded"
    random: ClassVar[bool] = False
    subtracts: ClassVar[bool] = True
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = None

    def fill(self, start: Start) -> Tensor | None:
        W_OI, r = weight_of(start)
        Q_OK, R_KI = torch.linalg.qr(W_OI)
        write(start, R_KI[:r], Q_OK[:, :r])
        return None
