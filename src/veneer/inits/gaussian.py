"""A from a normal distribution with standard deviation 1/r, B zero: the start of diffusion models' LoRA."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor, nn

from veneer.core.init import AbstractInit, Identity, Start


@final
class Init(AbstractInit):
    """Normal A of deviation 1/r and zero B; on an embedding zero A and standard normal B."""

    identity: ClassVar[Identity] = "exact"
    random: ClassVar[bool] = True
    subtracts: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = None

    def fill(self, start: Start) -> Tensor | None:
        A, B, bias = start.A, start.B, start.bias
        if start.base.zero_factor == "B":
            # A holds the rows of every expert, where W does.
            experts = start.base.shape()[0] // B.shape[0]
            nn.init.normal_(A, std=experts / A.shape[0])
            nn.init.zeros_(B)
        else:
            nn.init.zeros_(A)
            nn.init.normal_(B)
        if bias is not None:
            nn.init.zeros_(bias)
        return None
