"""Tensors that are split over the processes: put together whole to be saved, and split again when they are read.

Putting one together is a conversation of all processes: each must ask for the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.embeddings import embeddings_to_save
from veneer.adapters.model import PeftModel
from veneer.core.errors import TrainingError
from veneer.engine.head import is_split


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every parameter by name; asked for before a model is split."""
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}


def settle(model: nn.Module) -> None:
    """Let go of what was put together to compute with: afterwards every parameter is a part."""
    if is_split(model):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes; one that is whole already is given back."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size], *, keep: bool
) -> dict[str, Tensor]:
    """Whole copies on the CPU, by name; one under two names is one tensor.

    Args:
        tensors: names and tensors, the same in every process.
        shapes: what must come out, by name.
        keep: whether this process wants them; the others only take part, and get nothing.

    Raises:
        TrainingError: a tensor is empty or has another shape than before the model was split: nothing may be saved.
    """
    found: dict[str, Tensor] = {}
    # With the tensor itself: the id of one that is gone may come again.
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for name, tensor in tensors:
        if id(tensor) not in seen:
            full = whole(tensor.detach())
            expected = shapes.get(name, tensor.shape)
            if full.shape != expected or not full.numel():
                raise TrainingError(
                    f"{name} came together from the processes as {tuple(full.shape)}, expected {tuple(expected)}; "
                    "nothing is saved."
                )
            seen[id(tensor)] = tensor, full.to("cpu", copy=True) if keep else full[:0]
        if keep:
            found[name] = seen[id(tensor)][1]
    return found


def saved_state(model: nn.Module, shapes: Mapping[str, torch.Size], *, keep: bool) -> dict[str, Tensor] | None:
    """What ``save_pretrained`` of a split model needs as its ``state_dict``; None for a model that is whole."""
    if not is_split(model):
        return None
    settle(model)
    return gathered(wanted(model), shapes, keep=keep)


def wanted(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The names and tensors that are saved of a model: what learns and the adapters' own, or everything.

    One tensor under two names is there twice.
    """
    # Not those of the state dict, which are new tensors each.
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(model, PeftModel):
        own = _of_adapters(model)
        return [(name, tensor) for name, tensor in named.items() if id(tensor) in own]
    return [(name, named.get(name, tensor)) for name, tensor in model.state_dict().items()]


def _of_adapters(model: PeftModel) -> set[int]:
    """The ids of the parameters that go into the files of a model's adapters."""
    adapted = model.base_model
    found = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for name in model.peft_config:
        found |= {id(t) for layer in adapted.layers_of(name).values() for t in layer.tensors(name).values()}
        found |= {id(t) for wrapper in adapted.saved_of(name).values() for t in wrapper.module_for(name).parameters()}
        found |= {id(table) for table in embeddings_to_save(adapted, name, "auto").values()}
    return found


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that every process has, split as another one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    here = tensor.to(like.device, like.dtype)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def state_placed(state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's whole state, each tensor of a parameter's shape split as that parameter is."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    return {
        **state,
        "state": {
            number: {
                key: placed(value, parameters[number])
                if isinstance(value, Tensor) and value.shape == parameters[number].shape
                else value
                for key, value in values.items()
            }
            for number, values in state["state"].items()
        },
    }
