"""Saved activations in main memory while the GPU computes on: away after the forward pass, back before the backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

SMALLEST = 1 << 20
"""Bytes below which a tensor stays where it is: a copy of its own would take longer than it saves."""


@contextlib.contextmanager
def offloaded(model: nn.Module, *, smallest: int = SMALLEST, device_type: str = "cuda") -> Iterator[None]:
    """Inside, what autograd saves goes to pinned main memory, and comes back when the backward pass asks for it.

    >>> with offloaded(model):
    ...     model(**batch).loss.backward()

    Parameters and buffers stay, and so does what is smaller than ``smallest`` or lies on another device. Python does
    not wait for the copies. veneer's own tests have run this without a GPU only.

    Args:
        model: whose parameters stay.
        smallest: in bytes.
        device_type: of the device that is to be relieved.
    """
    away = _Away(model, smallest, device_type)
    with torch.autograd.graph.saved_tensors_hooks(away.pack, away.unpack):
        yield


@final
class _Away:
    def __init__(self, model: nn.Module, smallest: int, device_type: str) -> None:
        self.static = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.smallest = smallest
        self.device_type = device_type

    def pack(self, tensor: Tensor) -> Any:
        stays = tensor.untyped_storage().data_ptr() in self.static
        if stays or tensor.device.type != self.device_type or tensor.nbytes < self.smallest:
            return tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        # The memory of the tensor may be given away at once: who writes there comes after this copy in the stream.
        kept.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, kept

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, kept = packed
        back: Tensor = kept.to(device, non_blocking=True)
        return back
