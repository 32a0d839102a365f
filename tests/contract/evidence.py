"""What starts need to know of data. A new start that gathers evidence needs an entry here and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.adapters.corda import preprocess_corda
from veneer.adapters.eva import get_eva_state_dict, with_directions
from veneer.adapters.index import ModuleIndex, view
from veneer.adapters.lora_ga import preprocess_loraga
from veneer.core import registry


def _corda(model: nn.Module, config: Any, batches: list[Tensor]) -> None:
    preprocess_corda(model, config, run_model=lambda: [model(x) for x in batches])


def _eva(model: nn.Module, config: Any, batches: list[Tensor]) -> None:
    how = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "forward_fn": lambda model, x: model(x)}
    with_directions(model, config, get_eva_state_dict(model, batches, config, **how))


def _lora_ga(model: nn.Module, config: Any, batches: list[Tensor]) -> None:
    preprocess_loraga(model, config, lambda: [model(x).float().square().sum().backward() for x in batches])


GATHER: dict[str, Callable[[nn.Module, Any, list[Tensor]], None]] = {"corda": _corda, "eva": _eva, "lora_ga": _lora_ga}


def prepare(model: nn.Module, config: Any, inputs: Callable[[], Tensor]) -> None:
    """Gather what the config's start needs, by the function that a user calls, on batches of their own seed."""
    if registry.load("inits", config.init).Init.evidence is None:
        return
    if config.init not in GATHER:
        pytest.fail(f"inits/{config.init}.py is new and needs evidence: give it an entry in GATHER of {__file__}.")
    slot = ModuleIndex(model).slots["layer"]
    with torch.random.fork_rng():
        torch.manual_seed(17)
        batches = [inputs() for _ in range(3)]
    # A module whose parameters are adapted by themselves has no view of its own.
    dtype = next(model.parameters()).dtype if slot.kind is None else view(slot).placement()[1]
    GATHER[config.init](model, config, [x.to(dtype) if x.is_floating_point() else x for x in batches])
