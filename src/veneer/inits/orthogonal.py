"""Factors that both hold random values and whose product is zero: they use two halves of one orthogonal basis.

https://datta0.github.io/posts/rethink-lora-init/
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from veneer.core.errors import ConfigError
from veneer.core.init import AbstractInit, Identity, Start, write


@final
class Init(AbstractInit):
    """A is in the span of the odd rows of a random orthogonal (R, R) matrix, B in that of the even ones."""

    identity: ClassVar[Identity] = "rounded"
    random: ClassVar[bool] = True
    subtracts: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = None

    def fill(self, start: Start) -> Tensor | None:
        O, I = start.base.shape()  # noqa: E741 - the letters of the shape legend in base.py
        r = start.A.shape[0]
        if not start.base.one_matrix or start.A.numel() != r * I or start.B.numel() != O * r:
            raise ConfigError(
                "init_lora_weights='orthogonal' has no meaning on this "
                f"{type(start.base.module).__name__}, whose factors are not one pair of matrices; use true."
            )
        if r % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank, for two equal halves; not {r}.")
        wide = torch.promote_types(start.A.dtype, torch.float32)
        how = {"dtype": wide, "device": start.A.device}
        basis_RR, _ = torch.linalg.qr(torch.randn(r, r, **how))  # type: ignore[arg-type]
        A_IR = torch.randn(I, r // 2, **how) @ basis_RR[0::2]  # type: ignore[arg-type]
        B_OR = torch.randn(r // 2, O, **how).t() @ basis_RR[1::2]  # type: ignore[arg-type]
        write(start, A_IR.t() / 10, B_OR / 10)
        return None
