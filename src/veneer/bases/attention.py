"""``torch.nn.MultiheadAttention``: the weight is its packed projection of queries, keys and values, (3E, E).

The module's ``out_proj`` is adapted with it, as in PEFT, and is a linear layer of its own: whoever selects the one
takes the other along. Neither is ever called; both are read.
"""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from veneer.core.base import WeightBase, product


@final
class Base(WeightBase):
    """Attention whose queries, keys and values have one width, so that it keeps one weight for all three."""

    factor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    zero_factor: ClassVar[Literal["A", "B"]] = "B"
    has_output_bias: ClassVar[bool] = False
    fan_in_fan_out: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    own_leaf: ClassVar[str] = "in_proj_weight"

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
            return False
        weights = (module._parameters.get("in_proj_weight"), module.out_proj._parameters.get("weight"))
        return all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in weights)

    def shape(self) -> tuple[int, int]:
        W_OI = self.weight()
        return W_OI.shape[0], W_OI.shape[1]

    def placement(self) -> tuple[torch.device, torch.dtype]:
        return self.weight().device, self.weight().dtype

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out, inputs = self.shape()
        return (r, inputs), (out, r)

    def weight(self) -> Tensor:
        W_OI: Tensor = self.module.in_proj_weight
        return W_OI

    def bias_name(self) -> str | None:
        return "in_proj_bias" if self.module.in_proj_bias is not None else None

    def replace(self, W_OI: Tensor) -> None:
        self.module.in_proj_weight = nn.Parameter(W_OI, requires_grad=False)

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        return product(A, B)

    def stored(self, W_OI: Tensor) -> Tensor:
        return W_OI
