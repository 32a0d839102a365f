"""Any other quantised linear layer: GPTQ, AWQ, HQQ, AQLM, EETQ, torchao, torch's own, ...

Only its output is counted on. Where the layer can also give its weight back, variants that need it work and merging
into a plain layer does; nothing is ever merged into the packed form.

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.core.base import Into, QuantisedBase
from veneer.core.errors import ConfigError, MergeError
from veneer.kernels.dropout import drop
from veneer.kernels.lora_linear import low_rank
from veneer.kernels.lora_quantised import quantised_adapted

_PACKAGES = (
    "aqlm",
    "auto_gptq",
    "awq",
    "compressed_tensors",
    "eetq",
    "gptqmodel",
    "hqq",
    "optimum.quanto",
    "torch.ao.nn.quantized",
    "torchao",
    "transformers.integrations",
    "vptq",
)
"""Where quantised layers come from. A layer is known by its package, so that none of them needs to be imported."""
_SIZES = (("out_features", "in_features"), ("outfeatures", "infeatures"))


@final
class Base(QuantisedBase):
    """A linear layer by its sizes and its output."""

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        if not any(all(isinstance(getattr(module, size, None), int) for size in pair) for pair in _SIZES):
            return False
        # torchao leaves the layer an nn.Linear and puts a tensor of its own in the place of the weight.
        return _is_from(type(module), _PACKAGES) or _is_from(type(module._parameters.get("weight")), ("torchao",))

    def shape(self) -> tuple[int, int]:
        out, inputs = next(pair for pair in _SIZES if hasattr(self.module, pair[0]))
        return getattr(self.module, out), getattr(self.module, inputs)

    def placement(self) -> tuple[torch.device, torch.dtype]:
        held = [t for t in (*self.module._parameters.values(), *self.module._buffers.values()) if t is not None]
        wide = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        dtype = next((tensor.dtype for tensor in held if tensor.dtype in wide), torch.float32)
        return held[0].device if held else torch.device("cpu"), dtype

    def weight(self) -> Tensor:
        read = _reader(self.module)
        if read is None:
            kind = type(self.module)
            raise ConfigError(
                f"A {kind.__module__}.{kind.__name__} does not give its weight back, which this asks for: plain LoRA "
                "trains on it, but what is computed from W (DoRA, starts from W, merging) needs a base in full "
                "precision or in bitsandbytes' format."
            )
        return read().detach().reshape(self.shape())

    def bias_name(self) -> str | None:
        return "bias" if self.module._parameters.get("bias") is not None else None

    def replace(self, W_OI: Tensor) -> None:
        raise MergeError(self._not_into())

    def settle(self) -> bool:
        return False

    def check_merge(self, into: Into) -> None:
        if into == "requantised":
            raise MergeError(self._not_into())
        try:
            self.weight()
        except ConfigError as refusal:
            raise MergeError(str(refusal)) from None

    def _not_into(self) -> str:
        return (
            f"A {type(self.module).__name__} cannot be given another weight; merge into='dequantised', or into the "
            "full-precision base (veneer merge --adapter ADAPTER --model BASE) and quantise the result."
        )

    def stored(self) -> list[Tensor]:
        held = {**self.module._parameters, **self.module._buffers}
        return [tensor for name, tensor in held.items() if tensor is not None and name != "bias"]

    def bias(self) -> Tensor | None:
        own: Any = getattr(self.module, "bias", None)
        found: Tensor | None = own() if callable(own) else own
        return found

    def frozen(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        if x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
            raise ConfigError(
                f"A {type(self.module).__name__} has no gradient for its input, so nothing before it could learn; "
                "train on a base in full precision or in bitsandbytes' format."
            )
        return y

    def adapted(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        readable = _reader(self.module) is not None
        return quantised_adapted(self, x, A, B, scaling, bias_O=bias, dropout=dropout, readable=readable)

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        return low_rank(x, A, B, scaling, bias_O=bias, dropout=dropout)

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        return drop(x, dropout)


def _reader(module: Any) -> Callable[[], Tensor] | None:
    """What gives the dequantised weight of a layer, where its library has a way to ask for it."""
    own = getattr(module, "weight", None)
    if isinstance(own, Tensor) and _is_from(type(own), ("torchao",)):
        return own.dequantize
    if own is not None and not isinstance(own, Tensor):
        return lambda: own().dequantize()  # type: ignore[no-any-return]
    return getattr(module, "dequantize", None)


def _is_from(kind: type, packages: tuple[str, ...]) -> bool:
    return any(kind.__module__ == package or kind.__module__.startswith(f"{package}.") for package in packages)
