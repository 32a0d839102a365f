"""PiSSA: the factors are W's leading singular components, and the adapter stands on the rest.

Meng et al., arXiv 2404.02948.
"""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from veneer.core.init import AbstractInit, Identity, Start, weight_of, write
from veneer.kernels.svd import full_svd


@final
class Init(AbstractInit):
    """``B = U sqrt(S / s)``, ``A = sqrt(S / s) V'`` of the first r singular triplets, from LAPACK's decomposition."""

    identity: ClassVar[Identity] = "rounded"
    random: ClassVar[bool] = False
    subtracts: ClassVar[bool] = True
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = None

    def fill(self, start: Start) -> Tensor | None:
        W_OI, r = weight_of(start)
        found = full_svd(W_OI, r)
        root_R = (found.S / start.scaling).sqrt()
        write(start, root_R[:, None] * found.Vh, found.U * root_R)
        return None
