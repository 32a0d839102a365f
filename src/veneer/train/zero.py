"""ZeRO-2 and ZeRO-3, which are DeepSpeed's, through accelerate.

ZeRO-2 splits gradients and the optimiser's state over the processes; ZeRO-3 the parameters too, and puts one decoder
layer together at a time. Rajbhandari et al., arXiv 1910.02054.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.model import PeftModel
from veneer.adapters.saved import ModulesToSaveWrapper
from veneer.core.errors import ConfigError, UsageError
from veneer.engine import checkpointing
from veneer.engine.head import underlying
from veneer.train.config import RunConfig
from veneer.train.shards import gathered, wanted
from veneer.train.sharing import AbstractSharing

if TYPE_CHECKING:
    from accelerate import Accelerator

_STAGES = (2, 3)


def check_installed() -> None:
    """Raise UsageError when DeepSpeed is not there."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("strategy=deepspeed needs DeepSpeed, which is not installed: pip install deepspeed.")


def plugin_for(config: RunConfig, *, bf16: bool, processes: int, device: str) -> Any:
    """accelerate's plugin, from its own config or DeepSpeed's, with the numbers of this run.

    Raises:
        ConfigError: that config has other numbers, or asks for what veneer does not do.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations import unset_hf_deepspeed_config

    # Else transformers would load a model in parts, which cannot be adapted to its values.
    unset_hf_deepspeed_config()
    plugin = DeepSpeedPlugin(zero3_init_flag=False)
    _configure(plugin.deepspeed_config, config, processes=processes)
    plugin.set_mixed_precision("bf16" if bf16 else "no")
    return plugin


def _configure(settings: dict[str, Any], config: RunConfig, *, processes: int) -> None:
    own = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "train_batch_size": config.batch_size * config.accumulation * processes,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip or 0.0,
        "fp16": {"enabled": False},
    }
    for name, value in own.items():
        given = settings.get(name, "auto")
        # accelerate's own value where nobody gave one.
        if given not in ("auto", value) and (name, given) != ("gradient_accumulation_steps", 1):
            raise ConfigError(f"DeepSpeed's config has {name}={given}, and the run {value}; set it to auto there.")
    zero = settings["zero_optimization"]
    if zero["stage"] not in _STAGES:
        raise ConfigError(f"DeepSpeed's config has ZeRO stage {zero['stage']}; expected 2 or 3, or strategy=ddp.")
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device", "none") not in ("none", None):
            raise ConfigError(f"DeepSpeed's {part} is not for veneer's runs; use more processes, or leave it out.")
    for part, article in (("optimizer", "an"), ("scheduler", "a")):
        if part in settings:
            raise ConfigError(f"DeepSpeed's config has {article} {part}; a run has its own: leave it out there.")
    # The micro-batches of a step are counted by the run, and told to DeepSpeed one by one.
    settings.update(own, gradient_accumulation_steps=1, train_batch_size=config.batch_size * processes)


def check_model(model: nn.Module, stage: int) -> None:
    """Raise ConfigError when a model has what ZeRO-3 cannot train."""
    if stage != 3 or not isinstance(model, PeftModel):
        return
    table: Any = underlying(model).get_input_embeddings()  # type: ignore[operator]
    if not isinstance(table, ModulesToSaveWrapper) and any(p.requires_grad for p in table.parameters()):
        raise ConfigError(
            "ZeRO-3 collects the gradients of an adapter with that of its input, and token ids have none; leave the "
            "embeddings out, name them in modules_to_save, or use strategy=fsdp."
        )


@final
class ZeroSharing(AbstractSharing):
    """A model in DeepSpeed's engine.

    Args:
        accelerator: of the run.
        bare: the model.
        optimiser: over its parameters.
        shapes: of its parameters.

    Raises:
        UsageError: something else runs than was asked for.
    """

    def __init__(
        self, accelerator: Accelerator, bare: nn.Module, optimiser: Optimizer, shapes: Mapping[str, torch.Size]
    ) -> None:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        names = {id(parameter): name for name, parameter in bare.named_parameters()}
        self.order = [names[id(p)] for group in optimiser.param_groups for p in group["params"]]
        self.groups = optimiser.state_dict()["param_groups"]
        self.bare, self.optimiser, self.shapes = bare, optimiser, shapes
        # In bfloat16 DeepSpeed keeps what learns in float32 beside the model.
        self.learning = {name: p.dtype for name, p in bare.named_parameters() if p.requires_grad}
        if stage == 3:
            from deepspeed.utils import set_z3_leaf_modules

            # Adapters and kernels read weights without calling the modules that hold them: what is put together is a
            # layer, or an adapted module outside of the layers.
            kinds = {type(block) for block in checkpointing.blocks(bare)} | {AdaptedLayer}
            set_z3_leaf_modules(bare, list(kinds), raise_if_not_found=False)
            # It collects a layer's gradients when that of its input is there, and too early where there is none.
            underlying(bare).enable_input_require_grads()  # type: ignore[operator]
        self.model, _ = accelerator.prepare(bare, optimiser)
        self.engine: Any = self.model
        self.last = True
        runs = getattr(self.engine, "zero_optimization_stage", lambda: None)()
        if runs != stage or self.engine.dp_world_size != accelerator.num_processes:
            raise UsageError(f"The run is to share its model by ZeRO-{stage}, but does not: stage {runs} runs.")

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        self.last = last
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        # Not accelerator.backward, which takes the step with it, whatever the loss was.
        self.engine.set_gradient_accumulation_boundary(self.last)
        self.engine.backward(loss)

    def step(self, clip: float | None) -> float:
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def forget(self) -> None:
        self.engine.zero_grad()

    def learned(self, *, keep: bool) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = dict(self.bare.named_parameters())
        found: dict[str, Tensor] = {}
        for name in self.learning:
            found |= gathered([(name, safe_get_full_fp32_param(parameters[name]))], self.shapes, keep=keep)
        return found

    def optimiser_state(self, *, keep: bool) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        # DeepSpeed has one flat tensor for many parameters; some states are one number for all.
        flat = next(iter(self.optimiser.state.values()), {})
        if flat:
            self._link_state()
        numbers = {key: value for key, value in flat.items() if not isinstance(value, Tensor) or value.ndim == 0}
        parameters = dict(self.bare.named_parameters())
        state: dict[int, dict[str, Any]] = {}
        for at, name in enumerate(self.order if flat else ()):
            parts = [(key, safe_get_full_optimizer_state(parameters[name], key)) for key in flat if key not in numbers]
            kept = gathered(parts, {key: self.shapes[name] for key, _ in parts}, keep=keep)
            state[at] = {key: numbers.get(key, kept.get(key)) for key in flat}
        live = self.optimiser.param_groups
        groups = [{**now, "params": was["params"]} for was, now in zip(self.groups, live, strict=True)]
        return {"state": state if keep else {}, "param_groups": groups}

    def restore(self, learned: Mapping[str, Tensor], optimiser_state: dict[str, Any]) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameters = dict(self.bare.named_parameters())
        for name, tensor in learned.items():
            parameter, here = parameters[name], tensor.to(self.engine.device)
            safe_set_full_fp32_param(parameter, here)
            with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(here)
        for group, saved in zip(self.optimiser.param_groups, optimiser_state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        saved_state = optimiser_state["state"]
        if not saved_state:
            return
        self._begin_state(next(iter(saved_state.values())))
        for at, name in enumerate(self.order):
            for key, value in saved_state[at].items():
                if isinstance(value, Tensor) and value.ndim:
                    safe_set_full_optimizer_state(parameters[name], value.to(self.engine.device), key)

    def _begin_state(self, example: Mapping[str, Any]) -> None:
        """Give each flat tensor a state as one parameter has it; DeepSpeed would make it at the first step."""
        zero = self.engine.optimizer
        is_third = self.engine.zero_optimization_stage() == 3
        for flat in zero.fp32_partitioned_groups_flat if is_third else zero.single_partition_of_fp32_groups:
            self.optimiser.state[flat] = {
                key: torch.zeros_like(flat)
                if isinstance(value, Tensor) and value.ndim
                else value.to(flat.device, copy=True)
                if isinstance(value, Tensor)
                else value
                for key, value in example.items()
            }
        self._link_state()

    def _link_state(self) -> None:
        """Have DeepSpeed look where the state of each parameter lies."""
        if self.engine.zero_optimization_stage() == 2:
            # By itself it looks once, when the first group of parameters has a state and the others have none.
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def saved_state(self, *, keep: bool) -> dict[str, Tensor] | None:
        from deepspeed.runtime.zero import GatheredParameters

        learned = self.learned(keep=keep)
        first = {id(parameter): name for name, parameter in self.bare.named_parameters()}
        found: dict[str, Tensor] = {}
        for name, tensor in wanted(self.bare):
            own = first.get(id(tensor), name)
            if own not in found and own in self.learning:
                found |= {own: learned[own].to(self.learning[own])} if keep else {}
            elif own not in found:
                with GatheredParameters([tensor] if isinstance(tensor, nn.Parameter) else []):
                    found |= gathered([(own, tensor)], self.shapes, keep=keep)
            if keep:
                found[name] = found[own]
        return found
