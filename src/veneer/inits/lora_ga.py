"""LoRA-GA: the factors lie along the gradient of W, so that the first step goes where full fine-tuning would.

Wang et al., arXiv 2407.05000. ``veneer.adapters.lora_ga`` gathers the gradient.

Shape legend: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from veneer.core.config import LowRankConfig
from veneer.core.init import AbstractInit, Identity, Start, gathered, weight_of, write
from veneer.core.start_config import LoraGAConfig
from veneer.kernels.svd import leading_svd

GRADIENT = "gradient"
"""The evidence: (O, I), the mean gradient of the loss with respect to W."""


@final
class Init(AbstractInit):
    """A and B from different halves of the gradient's first 2 R singular vectors, scaled as the config says."""

    identity: ClassVar[Identity] = "rounded"
    random: ClassVar[bool] = False
    subtracts: ClassVar[bool] = True
    moves: ClassVar[bool] = False
    evidence: ClassVar[str | None] = GRADIENT
    repeatable: ClassVar[bool] = False

    def fill(self, start: Start) -> Tensor | None:
        assert isinstance(start.config, LowRankConfig)
        options = start.config.lora_ga_config
        assert isinstance(options, LoraGAConfig)
        W_OI, r = weight_of(start, ranks=2)
        (gradient_OI,) = gathered(start, GRADIENT, by="preprocess_loraga(model, config, train_step)")
        found = leading_svd(gradient_OI.to(W_OI.dtype), 2 * r)
        into_A, into_B = halves(options.direction, r)
        A_RI, S_R = found.Vh[into_A], found.S[into_B]
        B_OR = found.U[:, into_B] * S_R
        if options.scale == "stable":
            B_OR = B_OR * (W_OI.shape[0] ** 0.25 / options.stable_gamma**0.5)
        elif options.scale == "weight_svd" and S_R[0] > 0:
            B_OR = B_OR * (leading_svd(W_OI, 1).S[0] / S_R[0])
        elif options.scale == "gd_scale":
            A_RI, B_OR = A_RI / start.scaling, B_OR / start.scaling
        write(start, A_RI, B_OR)
        return None


def halves(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Which of the first 2 r singular vectors go into A, and which into B. "random" takes the same ones for both."""
    every = torch.arange(2 * r)
    if direction == "ArBr":
        return every[1::2], every[0::2]
    if direction == "A2rBr":
        return every[r:], every[:r]
    if direction == "ArB2r":
        return every[:r], every[r:]
    chosen = torch.randperm(2 * r)[:r]
    return chosen, chosen
