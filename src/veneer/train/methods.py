"""What of a model is trained: a low-rank adapter, everything, or the output head alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from veneer.adapters.kbit import bytes_per_weight, quantised_slots
from veneer.adapters.model import PeftModel, get_peft_model
from veneer.core.errors import ConfigError
from veneer.core.task_type import TaskType
from veneer.engine import checkpointing, room
from veneer.tasks import heads
from veneer.tasks.program import Program
from veneer.train.config import RunConfig
from veneer.train.starts import Gather

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trained:
    """A model ready to be trained."""

    model: nn.Module
    trainable: int
    """Parameters that learn."""
    total: int
    """Parameters of the model in use."""
    notes: tuple[str, ...]
    """What was done to the model, in sentences."""


def prepared(
    model: PreTrainedModel,
    config: RunConfig,
    task_type: TaskType,
    gather: Gather | None = None,
    program: Program | None = None,
) -> Trained:
    """Freeze and adapt a model as the config's method asks; it is changed in place.

    Args:
        model: the base model.
        config: the run.
        task_type: what the adapter's config says the model is for.
        gather: gathers what the adapter's start needs to know of the data.
        program: the user's code that made the model.

    Raises:
        ConfigError: the method or the adapter's config has no meaning on this model.
    """
    _check_savings(config, model)
    if program is not None and config.method != "lora":
        raise ConfigError(
            f"method={config.method} saves a whole model, and how a {type(model).__name__} of your own is saved is not "
            "known; use method=lora, with modules_to_save for what is to be trained whole."
        )
    if config.method == "lora":
        adapter, read = config.adapter(task_type), tuple[str, ...]()
        if program is not None:
            adapter = program.adapter(adapter, config.model)
        if gather is not None:
            adapter, read = gather(model, adapter)
        pooler = heads.untrained_pooler(model)
        if pooler is not None and not any("pooler" in name for name in adapter.modules_to_save or ()):
            read += (
                f"The head reads {pooler}, which looks as if it had never been trained: its bias is zero. "
                "--modules-to-save pooler trains it too.",
            )
        adapted = get_peft_model(model, adapter)
        return Trained(adapted, *adapted.get_nb_trainable_parameters(), notes=(*read, *_storage(adapted)))
    notes: list[str] = []
    if config.method == "full":
        model.requires_grad_(True)
    else:
        notes += heads.free(model)
    narrow = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    if narrow:
        notes.append(
            f"The trained parameters are {narrow.pop()}, which loses small updates; load the model in float32."
        )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Trained(model, trainable, sum(p.numel() for p in model.parameters()), tuple(notes))


def _check_savings(config: RunConfig, model: PreTrainedModel) -> None:
    """Refuse what cannot be saved on this model or machine.

    Raises:
        ConfigError: no layers to checkpoint or not so many; nothing to measure by; activations that are to leave a CPU.
    """
    from accelerate.state import AcceleratorState

    wanted = config.checkpoint
    if wanted != "off":
        checkpointing.check(model, int(wanted) if wanted.isdigit() else None)
    if wanted not in ("off", "on") and not checkpointing.blocks(model):
        raise ConfigError(f"{type(model).__name__} has no layers to checkpoint one by one; use checkpoint=on.")
    if wanted != "auto" and not config.offload_activations:
        return
    state = AcceleratorState()
    if state.distributed_type in ("FSDP", "DEEPSPEED"):
        option = "checkpoint=auto" if wanted == "auto" else "offload_activations"
        kind = state.distributed_type.value
        raise ConfigError(f"{option} needs whole parameters, and {kind} splits them; use checkpoint=on.")
    if wanted == "auto" and config.memory_limit is None and room.free(state.device) is None:
        raise ConfigError("checkpoint=auto needs a memory_limit here: this system does not say how much is free.")
    if config.offload_activations and state.device.type != "cuda":
        raise ConfigError(
            f"offload_activations moves activations from a GPU to main memory, and this run is on {state.device.type}; "
            "leave it out, or use checkpoint=auto."
        )


def _storage(adapted: PeftModel) -> tuple[str, ...]:
    """How a quantised base is stored."""
    slots = quantised_slots(adapted.base_model.index)
    if not slots:
        return ()
    size = bytes_per_weight(slots)
    return (f"{len(slots)} layers of the base are quantised and take {size:.3f} bytes a weight.",)
