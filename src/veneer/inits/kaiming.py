"""The default start: A as ``torch.nn.Linear`` starts its weight, B zero (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math
from typing import ClassVar, final

from torch import Tensor, nn

from veneer.core.init import AbstractInit, Identity, Start


@final
class Init(AbstractInit):
    """Kaiming-uniform A and zero B; on an embedding zero A and normal B, as the LoRA authors' code does."""

    identity: ClassVar[Identity] = "exact"
    random: ClassVar[bool] = True
    subtracts: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = None

    def fill(self, start: Start) -> Tensor | None:
        A, B, bias = start.A, start.B, start.bias
        if start.base.zero_factor == "B":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B)
        else:
            nn.init.zeros_(A)
            nn.init.normal_(B)
        if bias is not None:
            nn.init.zeros_(bias)
        return None
