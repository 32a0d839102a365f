"""Fast PiSSA: the same components, searched for instead of cut from the whole decomposition.

``init_lora_weights="pissa_niter_N"`` makes at least N steps, and goes on until the subspace is found to 1e-3.
PEFT makes N steps whatever they lead to. Meng et al., arXiv 2404.02948; see ``veneer.kernels.svd``.
"""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from veneer.core.config import TunerConfig
from veneer.core.init import AbstractInit, Identity, Start, weight_of, write
from veneer.kernels.svd import leading_svd


@final
class Init(AbstractInit):
    """PiSSA's factors from a randomised search whose error is measured. Its draw is the same each time."""

    identity: ClassVar[Identity] = "rounded"
    random: ClassVar[bool] = False
    subtracts: ClassVar[bool] = True
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = None
    # PEFT draws anew whenever it loads such a file, so what a file's factors started from is not known.
    repeatable: ClassVar[bool] = False

    def fill(self, start: Start) -> Tensor | None:
        assert isinstance(start.config, TunerConfig)
        steps = int(str(getattr(start.config, "init_lora_weights", "_0")).rpartition("_")[2])
        W_OI, r = weight_of(start)
        found = leading_svd(W_OI, r, least=steps)
        root_R = (found.S / start.scaling).sqrt()
        write(start, root_R[:, None] * found.Vh, found.U * root_R)
        return None
