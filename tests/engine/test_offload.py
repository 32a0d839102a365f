"""Offloading at its seam: what leaves, what stays, and the same gradients; the copies themselves need a GPU."""

from __future__ import annotations

import pytest
import torch

from veneer.engine import offload
from veneer.engine.offload import offloaded


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU())


def test_gradients_are_those_without() -> None:
    net, x = model(), torch.randn(50, 64, requires_grad=True)
    learn = [x, *net.parameters()]
    expected = torch.autograd.grad(net(x).square().sum(), learn)
    with offloaded(net, smallest=1, device_type="cpu"):
        y = net(x).square().sum()
    # The backward pass may be run outside: what was kept knows where it belongs.
    for one, other in zip(torch.autograd.grad(y, learn), expected, strict=True):
        assert torch.equal(one, other)


def test_parameters_and_small_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    pack = offload._Away.pack

    def watched(self, tensor):
        packed = pack(self, tensor)
        if not isinstance(packed, torch.Tensor):
            moved.append(tuple(tensor.shape))
            assert packed[1].data_ptr() != tensor.data_ptr()
        return packed

    monkeypatch.setattr(offload._Away, "pack", watched)
    net = model()
    with offloaded(net, smallest=50 * 64 * 4, device_type="cpu"):
        net(torch.randn(50, 64)).square().sum()
    assert moved
    assert set(moved) == {(50, 64)}
    moved.clear()
    with offloaded(net, smallest=50 * 64 * 4 + 1, device_type="cpu"):
        net(torch.randn(50, 64)).square().sum()
    assert moved == []


def test_what_lies_on_another_device_stays() -> None:
    net, x = model(), torch.randn(5, 64)
    with offloaded(net, smallest=1):
        y = net(x).sum()
    y.backward()
    assert net[0].weight.grad is not None
