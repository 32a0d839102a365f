"""``torch.nn.Embedding``: a linear layer over one-hot inputs, whose weight is stored (V, D).

Shape legend: V vocabulary (the inputs), D width (the outputs), R rank. PEFT stores A as (R, V), B as (D, R).
"""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.base import InputBase, product
from veneer.core.errors import ConfigError


@final
class Base(InputBase):
    """An embedding table, also one that scales its output by ``embed_scale`` (Gemma, M2M).

    Dropout drops whole tokens from the update: the input of A is one-hot, so its elements are tokens.
    """

    factor_names: ClassVar[tuple[str, str]] = ("lora_embedding_A", "lora_embedding_B")
    zero_factor: ClassVar[Literal["A", "B"]] = "A"
    has_output_bias: ClassVar[bool] = False
    fan_in_fan_out: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Embedding)
            and type(module._parameters.get("weight")) is nn.Parameter
            and module.weight.is_floating_point()
            and module.max_norm is None
            and (type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale"))
        )

    def shape(self) -> tuple[int, int]:
        W_VD = self.module.weight
        return W_VD.shape[1], W_VD.shape[0]

    def placement(self) -> tuple[torch.device, torch.dtype]:
        return self.module.weight.device, self.module.weight.dtype

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        width, vocabulary = self.shape()
        return (r, vocabulary), (width, r)

    def weight(self) -> Tensor:
        return self.module.weight.t()

    def bias_name(self) -> str | None:
        return None

    def replace(self, W_OI: Tensor) -> None:
        self.module.weight = nn.Parameter(W_OI.t().contiguous(), requires_grad=False)

    def frozen(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def adapted(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        y = self.frozen(x)
        return y + self.low_rank(x, A, B, scaling, bias=bias, dropout=dropout).to(y.dtype)

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        rows = F.embedding(x, A.t(), padding_idx=self.module.padding_idx)
        if dropout:
            kept = torch.rand(x.shape, device=x.device) >= dropout
            rows = rows * (kept / (1 - dropout)).unsqueeze(-1).to(rows.dtype)
        z = F.linear(rows, B) * scaling
        scale = getattr(self.module, "embed_scale", None)
        return z if scale is None else z * scale

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        if dropout:
            raise ConfigError("Token ids cannot be dropped before an embedding; set lora_dropout to 0 for it.")
        return x

    def rows(self, y: Tensor, value_O: Tensor) -> Tensor:
        return value_O

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        return product(A, B)
