"""CorDA: W is split along the directions in which real inputs matter, and the adapter stands on the rest.

Yang et al., arXiv 2406.05223. ``veneer.adapters.corda`` gathers the covariance of the inputs.

Shape legend: O outputs, I inputs, R rank, K the smaller of O and I.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from veneer.core.errors import ConfigError
from veneer.core.init import AbstractInit, Identity, Start, gathered, weight_of, write

SPLIT = ("U", "S", "V")
"""The evidence: (O, R), (R,) and (I, R)."""


@final
class Init(AbstractInit):
    """``B = U sqrt(S / s)``, ``A = sqrt(S / s) V'`` of W's components in the inputs' own measure."""

    identity: ClassVar[Identity] = "rounded"
    random: ClassVar[bool] = False
    subtracts: ClassVar[bool] = True
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = "covariance"
    repeatable: ClassVar[bool] = False

    def fill(self, start: Start) -> Tensor | None:
        W_OI, r = weight_of(start)
        U_OR, S_R, V_IR = gathered(start, *SPLIT, by="preprocess_corda(model, config, run_model=...)")
        if (U_OR.shape, V_IR.shape) != ((W_OI.shape[0], r), (W_OI.shape[1], r)):
            raise ConfigError(
                f"CorDA was prepared with {tuple(U_OR.shape)} and {tuple(V_IR.shape)} for a layer of "
                f"{tuple(W_OI.shape)} at rank {r}; call preprocess_corda with the same config, and no cache of another."
            )
        root_R = (S_R / start.scaling).sqrt()
        write(start, (V_IR * root_R).t(), U_OR * root_R)
        return None


def split(W_OI: Tensor, covariance_II: Tensor, r: int, *, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """The r components of W that matter most to inputs of this covariance ("ipm"), or least ("kpm").

    ``W C = U S V'``, and W itself is ``U S (V' C^-1)``. The covariance is damped until it can be inverted.

    Returns:
        U (O, R), S (R,) and ``C^-1 V`` (I, R).
    """
    C = covariance_II.to(W_OI.dtype)
    one = torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
    damping = 0.01
    while True:
        damped = C + one * (C.diagonal().mean() * damping)
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, one)) < 0.05:
            break
        damping *= 2
    U, S, Vh = torch.linalg.svd(W_OI @ damped, full_matrices=False)
    kept = slice(0, r) if method == "ipm" else slice(S.numel() - r, None)
    return U[:, kept].contiguous(), S[kept].contiguous(), (Vh[kept] @ inverse).t().contiguous()
