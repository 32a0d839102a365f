"""How several processes share a model, as the run or accelerate's config asks for it; and that it is so, asserted.

DDP gives every process the whole model. FSDP2 (torch's ``fully_shard``, through accelerate) splits every parameter
over the processes and puts one layer together at a time, while it computes. ZeRO is DeepSpeed's way to split a model.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from veneer.adapters.fingerprint import fingerprint
from veneer.adapters.model import PeftModel
from veneer.core.errors import ConfigError, UsageError, listed
from veneer.engine import checkpointing
from veneer.engine.head import underlying
from veneer.train import zero
from veneer.train.config import RunConfig
from veneer.train.shards import shapes_of
from veneer.train.sharing import AbstractSharing, TorchSharing

if TYPE_CHECKING:
    from accelerate import Accelerator

Strategy = Literal["ddp", "fsdp", "deepspeed"]

_ASKED: dict[str, Strategy] = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
"""What accelerate launch sets, and the strategy that it means."""

_NOT_OFFERED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}

_FSDP_INSTEAD = {
    "FSDP_ACTIVATION_CHECKPOINTING": "checkpoint=on in the run's config does that",
    "FSDP_OFFLOAD_PARAMS": "use more processes, or quantize with strategy=ddp",
}
"""Settings of accelerate's that are refused, and what to do instead."""

_OPTIMISERS = ("adamw", "sgd")
"""Those that compute each element of a tensor by itself, so that a part of it is enough."""


def chosen(config: RunConfig) -> Strategy:
    """The strategy of a run: its own, else what accelerate is configured for, else DDP.

    Raises:
        UsageError: accelerate is configured for another one, or for what is not offered.
        ConfigError: the run has what its parameters cannot be split with.
    """
    for variable, name in _NOT_OFFERED.items():
        if _is_set(variable):
            raise UsageError(
                f"accelerate is configured for {name}, which veneer does not offer: it trains with DDP, FSDP2 or ZeRO; "
                f"start the run with torchrun, or without what sets {variable}."
            )
    asked = next((strategy for variable, strategy in _ASKED.items() if _is_set(variable)), None)
    if asked is not None and config.strategy not in ("auto", asked):
        raise UsageError(
            f"accelerate is configured for {asked}, but strategy is {config.strategy}; leave strategy out, or start "
            "the run with torchrun."
        )
    strategy: Strategy = asked or ("ddp" if config.strategy == "auto" else config.strategy)
    if strategy == "ddp":
        return strategy
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UsageError(
            f"strategy={strategy} splits a model over several processes, and this is one; start them with "
            "torchrun --nproc-per-node N -m veneer train, or leave strategy out."
        )
    _check_config(config, strategy)
    if strategy == "fsdp":
        _check_fsdp(by_accelerate=asked is not None)
    else:
        zero.check_installed()
    return strategy


def _check_fsdp(*, by_accelerate: bool) -> None:
    # accelerate's own default is the first version.
    if by_accelerate and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("accelerate is configured for FSDP 1; veneer runs FSDP2: set fsdp_version to 2 there.")
    for variable, instead in _FSDP_INSTEAD.items():
        if _is_set(variable):
            raise UsageError(f"accelerate's {variable} is not for veneer's runs: {instead}.")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP" or os.environ.get(
        "FSDP_IGNORED_MODULES"
    ):
        raise UsageError(
            "accelerate's FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP and FSDP_IGNORED_MODULES are not for veneer's runs: a "
            "model is split at its layers, whole; leave them out."
        )


def _check_config(config: RunConfig, strategy: Strategy) -> None:
    refused = None
    if config.quantize is not None:
        refused = f"quantize={config.quantize} stores a base in a form that cannot be split"
    elif config.method == "lora" and config.family == "adalora":
        refused = "family=adalora weighs the ranks of all layers against each other, which needs them whole"
    elif config.optimizer not in _OPTIMISERS:
        refused = f"optimizer={config.optimizer} needs whole tensors ({strategy} takes {listed(_OPTIMISERS)})"
    if refused is not None:
        raise ConfigError(f"{refused}, so strategy={strategy} cannot train it; use strategy=ddp.")


def enter(accelerator: Accelerator, strategy: Strategy, config: RunConfig) -> None:
    """Make an accelerator one of this strategy.

    Raises:
        UsageError: this process has trained with another one before.
        ConfigError: DeepSpeed's config is not that of the run.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    before = {DistributedType.FSDP: "fsdp", DistributedType.DEEPSPEED: "deepspeed"}.get(accelerator.distributed_type)
    # accelerate may have taken it up by itself, as it is configured.
    asked = any(_is_set(variable) and meant == before for variable, meant in _ASKED.items())
    if before is not None and before != strategy and not asked:
        raise UsageError(f"This process has trained with strategy={before} before; train with {strategy} in a new one.")
    if strategy == "ddp":
        return
    # accelerate itself takes up neither without a GPU, and runs DDP without a word; what it does with both runs on a
    # CPU just as well.
    kind, state = DistributedType.FSDP, accelerator.state
    precision = accelerator.mixed_precision
    if strategy == "fsdp":
        state.fsdp_plugin = _plugin(precision)
    else:
        kind, processes = DistributedType.DEEPSPEED, accelerator.num_processes
        bf16, device = config.precision == "bf16", accelerator.device.type
        state.deepspeed_plugins = zero.plugin_for(config, bf16=bf16, processes=processes, device=device)
        accelerator.deepspeed_engine_wrapped = None
    PartialState().distributed_type = state.distributed_type = kind


def leave() -> None:
    """Make accelerate's state that of no strategy again, to be entered anew with another precision."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    if state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        device = state.device.type
        state.distributed_type = DistributedType(f"MULTI_{'GPU' if device == 'cuda' else device.upper()}")


def _plugin(precision: str) -> Any:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    narrow = torch.bfloat16 if precision == "bf16" else None
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        # With it the other processes have an empty model, which cannot be adapted to its values.
        cpu_ram_efficient_loading=False,
        # Gradients are summed in float32, as DDP sums them.
        mixed_precision_policy=narrow and MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32),
    )


def check_model(accelerator: Accelerator, model: nn.Module) -> tuple[str, ...]:
    """Whether a model can be shared as the accelerator is to share it, and what there is to say of it, in sentences.

    Raises:
        ConfigError: it cannot be split: it has no layers, is quantised, or accelerate's config names other layers.
    """
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return ()
    strategy = kind.value.lower()
    stage = 0 if kind is DistributedType.FSDP else accelerator.state.deepspeed_plugin.zero_stage
    names = sorted({type(block).__name__ for block in checkpointing.blocks(model)})
    if not names:
        raise ConfigError(f"strategy={strategy} splits a model at its layers, and this one has none; use strategy=ddp.")
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise ConfigError(f"strategy={strategy} cannot split a quantised model; use strategy=ddp.")
    zero.check_model(model, stage)
    shared = f"{accelerator.num_processes} processes"
    reading = "before that, every process reads all of it into main memory."
    if stage == 2:
        return (f"ZeRO-2: gradients and the optimiser's state are split over {shared}; each has the whole model.",)
    if stage == 3:
        return (f"ZeRO-3: the model is split over {shared} at {listed(names)}; {reading}",)
    plugin = accelerator.state.fsdp_plugin
    wanted = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    if wanted and sorted(wanted.split(",")) != names:
        raise ConfigError(
            f"accelerate's FSDP_TRANSFORMER_CLS_TO_WRAP is {wanted}; this model is split at {listed(names)}, so leave "
            "it out."
        )
    plugin.transformer_cls_names_to_wrap = names
    return (f"FSDP2: the model is split over {shared} at {listed(names)}; {reading}",)


def spread(accelerator: Accelerator, model: nn.Module, optimiser: Optimizer) -> AbstractSharing:
    """Share a model and its optimiser among the processes as the accelerator's strategy has it.

    With FSDP2 the transformers model itself is changed in place, and an adapted model around it is called as ever.

    Raises:
        UsageError: something else runs than was asked for.
    """
    from accelerate.utils import DistributedType

    shapes = shapes_of(model)
    fault = None
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        _remember_base(model)
        return zero.ZeroSharing(accelerator, model, optimiser, shapes)
    if accelerator.distributed_type is DistributedType.FSDP:
        _remember_base(model)
        shared, prepared = accelerator.prepare(underlying(model), optimiser)
        for module in model.modules():
            # Those outside of what is split, such as VeRA's pair.
            module._buffers.update(
                {k: b if b is None else b.to(accelerator.device) for k, b in module._buffers.items()}
            )
        fault = _not_split(shared, prepared, accelerator.num_processes)
    else:
        shared, prepared = accelerator.prepare(model, optimiser)
        if accelerator.num_processes > 1 and not isinstance(shared, nn.parallel.DistributedDataParallel):
            fault = f"accelerate made a {type(shared).__name__} of the model"
    if fault is not None:
        kind = accelerator.distributed_type.value
        raise UsageError(f"The run is to share its model by {kind}, but does not: {fault}.")
    return TorchSharing(accelerator, model, shared, prepared, shapes)


def _remember_base(model: nn.Module) -> None:
    """Have the mark of the base that goes into an adapter's file made, for which a split one cannot be read."""
    for name in model.peft_config if isinstance(model, PeftModel) else ():
        adapted = model.base_model
        fingerprint(adapted, [*adapted.saved_of(name), *adapted.tokens.covered(name)])


def _not_split(model: nn.Module, optimiser: Optimizer, processes: int) -> str | None:
    """In what a model is not split over all processes, as a clause; None when it is."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not isinstance(model, FSDPModule):
        return f"accelerate made a {type(model).__name__} of the model"
    own = {id(parameter) for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) or parameter.device_mesh.size() != processes:
            return f"{name} is whole in every process"
    for group in optimiser.param_groups:
        if any(id(parameter) not in own for parameter in group["params"]):
            return "the optimiser has other parameters than the model"
    return None


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
