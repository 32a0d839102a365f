"""A from a normal distribution with standard deviation 1/r, B zero: the start of diffusion models' LoRA."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor, nn

from veneer.core.base import AbstractBase
from veneer.core.init import AbstractInit


@final
class Init(AbstractInit):
    """Normal A of deviation 1/r and zero B; on an embedding zero A and standard normal B."""

    identity: ClassVar[bool] = True

    def fill(self, base: AbstractBase, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        if base.zero_factor == "B":
            nn.init.normal_(A, std=1 / A.shape[0])
            nn.init.zeros_(B)
        else:
            nn.init.zeros_(A)
            nn.init.normal_(B)
        if bias is not None:
            nn.init.zeros_(bias)
