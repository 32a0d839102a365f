"""The small modules that carry an adapter's tensors, of the classes that PEFT has there."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd


def holder_for(name: str, shape: tuple[int, ...], module: nn.Module) -> nn.Module:
    """The module that carries ``weight`` (and ``bias``) as in PEFT, made without a start of its own.

    It is called like PEFT's: a Linear, or for a convolution one that strides and pads as that does (A) or one of
    kernel 1 (B).
    """
    if not isinstance(module, _ConvNd) or len(shape) != module.weight.ndim:
        holder: Any = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(holder)
        holder.out_features, holder.in_features = shape
        holder._parameters.update(weight=None, bias=None)
        return holder  # type: ignore[no-any-return]
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
    own = ("stride", "padding", "dilation", "padding_mode") if name.endswith("_A") else ("groups",)
    options: Any = {option: getattr(module, option) for option in own}
    channels = shape[1] * options.get("groups", 1)
    holder = kind(channels, shape[0], shape[2:], bias=False, device="meta", **options)
    holder._parameters["weight"] = None
    return holder  # type: ignore[no-any-return]
