"""A safetensors file written tensor by tensor, for files that are larger than memory.

The format: the length of the header as eight bytes, the header as JSON, then the tensors one after the other.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from veneer.core.errors import NotStreamableError

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNED = 8


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order that a file needs: wide elements first, so that each tensor is aligned to its own.

    Raises:
        NotStreamableError: a dtype that the format has no name for here.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise NotStreamableError(f"{name} holds {tensor.dtype}")
    return sorted(tensors, key=lambda name: -tensors[name].element_size())


def write_one_by_one(
    path: Path, like: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write tensors as they come; only one of them has to be in memory.

    Args:
        path: the file.
        like: the shape and dtype of each tensor, in the order of ``in_order``; no values, so they may be on meta.
        values: the tensors, in the same order.
        metadata: what the header says beside them.

    Raises:
        ValueError: a tensor that is not the one announced.
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in like.items():
        begin, end = end, end + math.prod(tensor.shape) * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    announced = iter(like.items())
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name, tensor in values:
            expected, same = next(announced, ("nothing", tensor))
            if (name, tensor.shape, tensor.dtype) != (expected, same.shape, same.dtype):
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} came where {expected} {tuple(same.shape)} was announced."
                )
            out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            # Let go of it before the next one is made.
            del tensor
        if (left := next(announced, None)) is not None:
            raise ValueError(f"{left[0]} was announced and did not come.")
