"""EVA: A holds the directions in which a layer's inputs vary most on real data, B is zero.

Paischer et al., arXiv 2410.07170. ``veneer.adapters.eva`` gathers the directions and may give layers other ranks.
"""

from __future__ import annotations

import math
import warnings
from typing import ClassVar, final

from torch import Tensor, nn

from veneer.core.errors import ConfigError
from veneer.core.init import AbstractInit, Identity, Start, gathered, write

DIRECTIONS = "directions"
"""The evidence: (R, I), a direction a row, the most important one first."""


@final
class Init(AbstractInit):
    """Directions as the rows of A. Without them A starts as LoRA's does, until they are brought in."""

    identity: ClassVar[Identity] = "exact"
    random: ClassVar[bool] = False
    subtracts: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = DIRECTIONS

    def fill(self, start: Start) -> Tensor | None:
        inputs = start.base.shape()[1]
        if not start.base.one_matrix or start.base.zero_factor != "B" or start.A.shape[1:] != (inputs,):
            raise ConfigError(
                "init_lora_weights='eva' needs inputs that the weight is multiplied by, row by row, which a "
                f"{type(start.base.module).__name__} does not have; take that module out of target_modules."
            )
        if start.evidence is None:
            warnings.warn(
                "EVA has no directions yet, so A starts at random: call initialize_lora_eva_weights(model, dataloader) "
                "before training.",
                stacklevel=8,
            )
            nn.init.kaiming_uniform_(start.A, a=math.sqrt(5))
            write(start, start.A.clone(), start.B.new_zeros(start.B.shape))
            return None
        (directions_RI,) = gathered(start, DIRECTIONS, by="initialize_lora_eva_weights(model, dataloader)")
        if directions_RI.shape != start.A.shape:
            raise ConfigError(
                f"EVA's directions for a {type(start.base.module).__name__} are {tuple(directions_RI.shape)}, but A is "
                f"{tuple(start.A.shape)}; gather them with the same config."
            )
        write(start, directions_RI, start.B.new_zeros(start.B.shape))
        return None
