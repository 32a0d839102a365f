"""transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored (I, O).

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from veneer.core.base import LinearBase
from veneer.kernels.dropout import drop
from veneer.kernels.lora_linear import lora_linear, low_rank


@final
class Base(LinearBase):
    """GPT-2's linear layer, known by its name so that transformers need not be imported."""

    fan_in_fan_out: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return (
            type(module).__name__ == "Conv1D"
            and type(module).__module__.startswith("transformers.")
            and type(module._parameters.get("weight")) is nn.Parameter
            and module.weight.is_floating_point()
        )

    def shape(self) -> tuple[int, int]:
        W_IO = self.module.weight
        return W_IO.shape[1], W_IO.shape[0]

    def placement(self) -> tuple[torch.device, torch.dtype]:
        return self.module.weight.device, self.module.weight.dtype

    def weight(self) -> Tensor:
        return self.module.weight.t()

    def bias_name(self) -> str | None:
        return "bias"

    def replace(self, W_OI: Tensor) -> None:
        self.module.weight = nn.Parameter(W_OI.t().contiguous(), requires_grad=False)

    def frozen(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def adapted(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        own = self.module.bias
        if bias is not None:
            own = own + (bias * scaling).to(own.dtype)
        return lora_linear(x, self.module.weight.t(), own, A, B, scaling, dropout)

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        return low_rank(x, A, B, scaling, bias_O=bias, dropout=dropout)

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        return drop(x, dropout)
