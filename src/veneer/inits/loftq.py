"""LoftQ: W is quantised, and the factors start at the best correction of what that cost.

Li et al., arXiv 2310.08659; NF4 and its code are from Dettmers et al., arXiv 2305.14314.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from veneer.core.config import LowRankConfig
from veneer.core.errors import ConfigError
from veneer.core.init import AbstractInit, Identity, Start, weight_of, write
from veneer.core.start_config import LoftQConfig
from veneer.kernels.quantise import int8_rounded, nf4_rounded
from veneer.kernels.svd import full_svd


@final
class Init(AbstractInit):
    """``W`` is about ``Q + s B A``: the adapter stands on the quantised weight Q, read back to W's dtype.

    PEFT leaves the scaling s out, so that only with ``lora_alpha == r`` its factors fit; here they always do.
    """

    identity: ClassVar[Identity] = "none"
    random: ClassVar[bool] = False
    subtracts: ClassVar[bool] = False
    moves: ClassVar[bool] = True
    evidence: ClassVar[str | None] = None

    def fill(self, start: Start) -> Tensor | None:
        assert isinstance(start.config, LowRankConfig)
        options = start.config.loftq_config
        assert isinstance(options, LoftQConfig)
        if not start.base.exact:
            raise ConfigError(
                f"init_lora_weights='loftq' quantises the weight itself, but this {type(start.base.module).__name__} "
                "is quantised already; use init_lora_weights=true and then replace_lora_weights_loftq(model)."
            )
        W_OI, r = weight_of(start)
        rounded = nf4_rounded if options.loftq_bits == 4 else int8_rounded
        correction_OI = torch.zeros_like(W_OI)
        for _ in range(options.loftq_iter):
            Q_OI = rounded(W_OI - correction_OI)
            A_RI, B_OR = halves(W_OI - Q_OI, r)
            correction_OI = B_OR @ A_RI
        write(start, A_RI / start.scaling**0.5, B_OR / start.scaling**0.5)
        return Q_OI.to(start.base.placement()[1])


def halves(residual_OI: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) whose product is the best approximation of a residual, the singular values shared."""
    found = full_svd(residual_OI, r)
    root_R = found.S.sqrt()
    return root_R[:, None] * found.Vh, found.U * root_R
