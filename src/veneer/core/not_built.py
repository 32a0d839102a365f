"""Fields of PEFT's LoraConfig that veneer refuses, each with the one value that is accepted and the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_REFUSED: dict[str, tuple[Any, str]] = {
    "runtime_config": (
        None,
        "its ephemeral_gpu_offload moves a layer to the GPU while DoRA's norms are taken, but here an adapter starts "
        "where its layer is. Move the model to the device before adapting it.",
    ),
    "megatron_config": (
        None,
        "it adapts the tensor-parallel layers of Megatron-LM, which split one weight over processes. Adapt the Hugging "
        "Face form of the model, whose layers are whole.",
    ),
    "megatron_core": (
        "megatron.core",
        "it names the package that megatron_config's layers come from, and those cannot be adapted. Adapt the Hugging "
        "Face form of the model.",
    ),
    "velora_config": (
        None,
        "VeLoRA saves memory by keeping a projection of the activations, which makes gradients approximate. Use "
        "use_lorafa=True or gradient checkpointing, whose gradients are exact.",
    ),
    "monteclora_config": (
        None,
        "MonteCLoRA draws the update anew in every step and needs a term of its own in the loss, which no training "
        "loop adds by itself. Use lora_dropout against overfitting.",
    ),
    "use_bdlora": (
        None,
        "BD-LoRA makes factors block-diagonal to fit the way one server splits a model over devices. Train a plain "
        "LoRA, which servers take as it is.",
    ),
    "arrow_config": (
        None,
        "Arrow chooses between adapters for every token, from all that are loaded. Choose for every row with "
        "adapter_names, or combine them with add_weighted_adapter.",
    ),
    "kasa_config": (
        None,
        "KaSA overwrites the base's weights for good, so disabling or deleting it would not give the base back. Use "
        "init_lora_weights='pissa', which starts from the same decomposition and leaves the base as it is.",
    ),
}

NOT_BUILT: Mapping[str, Any] = {name: accepted for name, (accepted, _) in _REFUSED.items()}
"""The only value that is accepted."""
REASONS: Mapping[str, str] = {name: reason for name, (_, reason) in _REFUSED.items()}
"""Why any other is refused, and what to do instead: a clause and a sentence."""


def is_off(value: Any, accepted: Any) -> bool:
    """Whether a value is the accepted one, or PEFT's object of options (or a mapping) with none of them on."""
    if value == accepted:
        return True
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return isinstance(value, Mapping) and not any(value.values())
