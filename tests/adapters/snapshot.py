"""Everything that can be seen of a model, to show that a failure left it as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Module types, modes, parameters by identity, their flags and copies of their values."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "modules": [(name, type(module), id(module), module.training) for name, module in model.named_modules()],
        "parameters": {name: (id(p), p.requires_grad, p.dtype) for name, p in parameters.items()},
        "values": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "hooks": [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part in ("modules", "parameters", "buffers", "hooks"):
        assert after[part] == before[part], part
    values: dict[str, Tensor] = after["values"]
    assert values.keys() == before["values"].keys()
    for name, value in before["values"].items():
        assert torch.equal(values[name], value), name
