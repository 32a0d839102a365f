"""MiCA: B is frozen at the left singular vectors of W's smallest singular values, A starts at zero and learns.

Minor component adaptation, arXiv 2604.01694.
"""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from veneer.core.init import AbstractInit, Identity, Start, weight_of, write


@final
class Init(AbstractInit):
    """The update writes only into the directions that W itself writes into least."""

    identity: ClassVar[Identity] = "exact"
    random: ClassVar[bool] = False
    subtracts: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = None
    frozen: ClassVar[Literal["A", "B"] | None] = "B"

    def fill(self, start: Start) -> Tensor | None:
        W_OI, r = weight_of(start)
        U_OK, _, _ = torch.linalg.svd(W_OI, full_matrices=False)
        write(start, torch.zeros_like(start.A), U_OK[:, -r:])
        return None
