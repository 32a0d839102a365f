"""``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``: a linear layer over the patches of its input.

Shape legend: C input channels, I the elements of one patch (C / groups times the kernel), O output channels, R rank,
K kernel. As in PEFT, A is a convolution (R, C, K) that strides and pads as the frozen one does, and B one of kernel 1,
in as many groups as the frozen one has. A has no groups: its update reaches every input channel.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.base import InputBase, product
from veneer.core.errors import ConfigError, MergeError
from veneer.kernels.dropout import drop

_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


@final
class Base(InputBase):
    """A convolution of any stride, padding, dilation and groups.

    With groups the update cannot be written into W, which has no place for inputs of another group: it is applied,
    and not merged.
    """

    factor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    zero_factor: ClassVar[Literal["A", "B"]] = "B"
    has_output_bias: ClassVar[bool] = True
    fan_in_fan_out: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        # A subclass with a forward of its own, such as one that standardises W or pads by itself, computes with
        # something else than W.
        return (
            isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            and type(module).forward in _FORWARDS
            and type(module._parameters.get("weight")) is nn.Parameter
            and module.weight.is_floating_point()
        )

    def shape(self) -> tuple[int, int]:
        W = self.module.weight
        return W.shape[0], W[0].numel()

    def placement(self) -> tuple[torch.device, torch.dtype]:
        return self.module.weight.device, self.module.weight.dtype

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        groups = self.module.groups
        if r % groups:
            raise ConfigError(
                f"The rank {r} of a {type(self.module).__name__} with {groups} groups must be a multiple of {groups}; "
                "choose such a rank (rank_pattern gives single modules their own), or leave that module out of "
                "target_modules."
            )
        kernel = tuple(self.module.kernel_size)
        return (r, self.module.in_channels, *kernel), (self.module.out_channels, r // groups, *(1 for _ in kernel))

    def weight(self) -> Tensor:
        return self.module.weight.flatten(1)

    def bias_name(self) -> str | None:
        return "bias" if self.module.bias is not None else None

    def replace(self, W_OI: Tensor) -> None:
        W = W_OI.reshape(self.module.weight.shape).contiguous()
        self.module.weight = nn.Parameter(W, requires_grad=False)

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
        module = self.module
        convolve = _CONVOLVE[A.ndim - 2]
        x, padding = self.drop(x, dropout), module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        z = convolve(x, A.to(x.dtype), None, module.stride, padding, module.dilation)
        y: Tensor = convolve(z, B.to(z.dtype), groups=module.groups)
        if bias is not None:
            y = y + self.rows(y, bias.to(y.dtype))
        return y * scaling

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        return drop(x, dropout)

    def rows(self, y: Tensor, value_O: Tensor) -> Tensor:
        return value_O.view(-1, *(1 for _ in self.module.kernel_size))

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        if self.module.groups > 1:
            raise MergeError(
                f"The update of a {type(self.module).__name__} with {self.module.groups} groups reaches the inputs of "
                "every group and its weight only those of one, so it has no place in the weight; use the adapter "
                "unmerged, or leave that module out of it."
            )
        return product(A.flatten(1), B.flatten(1))
