"""Files written tensor by tensor, read back by safetensors itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from veneer.adapters.tensorfile import _TYPES, in_order, write_one_by_one
from veneer.core.errors import NotStreamableError


def written(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    names = in_order(tensors)
    like = {name: torch.empty_like(tensors[name], device="meta") for name in names}
    write_one_by_one(path, like, ((name, tensors[name]) for name in names), metadata)
    return safetensors.torch.load_file(path)


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        # Narrow ones first: unsorted, those that follow would not be aligned.
        f"{number}.{len(shape)}": (torch.randn(shape) * 5).to(dtype)
        for number, dtype in enumerate(reversed(_TYPES))
        for shape in [(), (3,), (2, 3), (1, 3, 5), (0, 4)]
    }
    tensors["strided"] = torch.randn(4, 6).T
    found = written(tmp_path / "a.safetensors", tensors, {"format": "pt", "é": "ü"})
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*raw)
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "é": "ü"}


def test_the_content_is_that_of_the_library(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 2), "a": torch.randn(5)}
    found = written(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "a.safetensors").stat().st_size == (tmp_path / "b.safetensors").stat().st_size
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("values", [[("b", (2,))], [("a", (3,))], [], [("a", (2,)), ("a", (2,))]])
def test_what_is_not_announced_is_refused(tmp_path: Path, values: list[tuple[str, tuple[int, ...]]]) -> None:
    like = {"a": torch.empty(2, device="meta")}
    with pytest.raises(ValueError, match="announced"):
        write_one_by_one(tmp_path / "a", like, ((name, torch.ones(shape)) for name, shape in values), {})
    with pytest.raises(ValueError, match="announced"):
        write_one_by_one(tmp_path / "a", like, [("a", torch.ones(2, dtype=torch.int64))], {})


def test_a_dtype_without_a_name() -> None:
    with pytest.raises(NotStreamableError, match=r"a holds torch.complex64"):
        in_order({"a": torch.ones(1, dtype=torch.complex64)})
