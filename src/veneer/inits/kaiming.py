"""The default start: A as ``torch.nn.Linear`` starts its weight, B zero (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math
from typing import ClassVar, final

from torch import Tensor, nn

from veneer.core.base import AbstractBase
from veneer.core.init import AbstractInit


@final
class Init(AbstractInit):
    """Kaiming-uniform A and zero B; on an embedding zero A and normal B, as the LoRA authors' code does."""

    identity: ClassVar[bool] = True

    def fill(self, base: AbstractBase, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        if base.zero_factor == "B":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B)
        else:
            nn.init.zeros_(A)
            nn.init.normal_(B)
        if bias is not None:
            nn.init.zeros_(bias)
