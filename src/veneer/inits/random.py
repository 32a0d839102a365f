"""Both factors random, so that a fresh adapter already changes the outputs: for tests and debugging."""

from __future__ import annotations

import math
from typing import ClassVar, final

from torch import Tensor, nn

from veneer.core.init import AbstractInit, Identity, Start


@final
class Init(AbstractInit):
    """A and B as ``torch.nn.Linear`` starts them; on an embedding both standard normal."""

    identity: ClassVar[Identity] = "none"
    random: ClassVar[bool] = True
    subtracts: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = None

    def fill(self, start: Start) -> Tensor | None:
        A, B, bias = start.A, start.B, start.bias
        if start.base.zero_factor == "B":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        else:
            nn.init.normal_(A)
            nn.init.normal_(B)
        if bias is not None:
            nn.init.uniform_(bias, -1 / math.sqrt(B.shape[-1]), 1 / math.sqrt(B.shape[-1]))
        return None
