"""PEFT's functions for models that hold adapters without a ``PeftModel``, and for adapters as state dicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.adapters import files, lifecycle
from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.embeddings import embeddings_to_save
from veneer.adapters.inject import inject
from veneer.adapters.loading import place
from veneer.adapters.model import PeftModel
from veneer.core.config import LoraConfig, PeftConfig, TunerConfig
from veneer.core.errors import ConfigError, UsageError

_ATTRIBUTE = "_veneer_adapted"


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Adapt a model in place and return the model itself instead of a ``PeftModel``; again, to add another adapter.

    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    >>> get_peft_model_state_dict(model)

    Args:
        peft_config: what to adapt and how.
        model: any torch module.
        adapter_name: the adapter's name; the newest is the active one.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device, to be loaded later.
        state_dict: an adapter's tensors, whose keys say which modules to adapt; its values are not read.

    Raises:
        UsageError: the name is taken, or the model is in a ``PeftModel``.
        TargetError: see ``get_peft_model``.
    """
    if isinstance(model, PeftModel):
        raise UsageError("This model is a PeftModel already; use add_adapter on it.")
    config = peft_config
    if state_dict is not None:
        assert isinstance(config, TunerConfig)
        config = replace(config, target_modules=_modules_of(state_dict))
    there = model.__dict__.get(_ATTRIBUTE)
    adapted = AdaptedModel(model) if there is None else there
    inject(adapted, adapter_name, config, device="meta" if low_cpu_mem_usage else None)
    model.__dict__[_ATTRIBUTE] = adapted
    lifecycle.activate(adapted, adapter_name, trainable=not config.inference_mode)
    return model


def adapted_of(model: nn.Module) -> AdaptedModel:
    """The adapters of a model: of a ``PeftModel``, of one compiled, or of one that they were injected into.

    Raises:
        UsageError: it has none.
    """
    inner = model.__dict__.get("_modules", {}).get("_orig_mod", model)
    if isinstance(inner, AdaptedModel):
        return inner
    if type(inner) is PeftModel:
        return inner.base_model
    found = inner.__dict__.get(_ATTRIBUTE)
    if not isinstance(found, AdaptedModel):
        raise UsageError(f"This {type(inner).__name__} has no adapters; use get_peft_model or inject_adapter_in_model.")
    return found


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors, keyed as in its file; without PEFT's prefix where the model is no ``PeftModel``.

    Args:
        model: an adapted model.
        state_dict: the gathered state dict of a sharded model to take values from.
        adapter_name: the adapter.
        unwrap_compiled: accepted as PEFT's option; a compiled model always counts as the one inside it.
        save_embedding_layers: also give the base's embeddings; "auto" when the vocabulary was resized.

    Raises:
        UsageError: no such adapter.
    """
    adapted = adapted_of(model)
    adapted.require(adapter_name)
    found = files.adapter_state(adapted, adapter_name, state_dict=state_dict)
    for path, weight in embeddings_to_save(adapted, adapter_name, save_embedding_layers).items():
        inner = "base_layer." if path in adapted.layers else ""
        inner = "token_adapter.base_layer." if path in adapted.tokens.wrappers else inner
        found[f"{files.PREFIX}{path}.{inner}weight"] = weight.detach()
    if _is_wrapped(model):
        return found
    return {key.removeprefix(files.PREFIX): tensor for key, tensor in found.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Put tensors keyed as in an adapter's file into an adapter of the model, in place.

    Args:
        model: an adapted model.
        peft_model_state_dict: all of the adapter's tensors, as ``get_peft_model_state_dict`` gives them.
        adapter_name: the adapter.
        ignore_mismatched_sizes: must stay False: half an adapter is none.
        low_cpu_mem_usage: accepted as PEFT's option; tensors are never made a second time.

    Returns:
        What torch's ``load_state_dict`` returns, with nothing missing and nothing unexpected.

    Raises:
        UsageError: no such adapter, or one that is merged.
        AdapterFileError: a missing, unexpected or misshapen tensor; all are named, and nothing has changed.
    """
    if ignore_mismatched_sizes:
        raise UsageError("ignore_mismatched_sizes=True would leave out tensors in silence; give those that fit.")
    adapted = adapted_of(model)
    adapted.require(adapter_name)
    named = {
        key if key.startswith(files.PREFIX) else f"{files.PREFIX}{key}": tensor
        for key, tensor in peft_model_state_dict.items()
    }
    config = adapted.peft_config[adapter_name]
    fitted = files.fit(adapted, files.AdapterFiles("The given state dict", config, named, {}))
    place(adapted, adapter_name, fitted, trainable=not config.inference_mode, autocast_adapter_dtype=True)
    return nn.modules.module._IncompatibleKeys([], [])


def load_peft_weights(model_id: str | Path, device: str | None = None, **where: Any) -> dict[str, Tensor]:
    """The tensors of a saved adapter, keyed as in its file.

    Args:
        model_id: an adapter folder, or a hub name when online.
        device: where to put them; the CPU when None.
        where: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        UsageError, AdapterFileError: see ``veneer.adapters.files.read``.
    """
    found = files.read(model_id, LoraConfig(), **where).tensors
    return {key: tensor.to(device or "cpu") for key, tensor in found.items()}


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Put what is frozen into a half precision and what learns into float32, for training with mixed precision.

    Args:
        model: any model.
        dtype: ``torch.float16`` or ``torch.bfloat16``.

    Raises:
        UsageError: another dtype.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise UsageError(f"Frozen parameters can be put into torch.float16 or torch.bfloat16, not {dtype}.")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def _is_wrapped(model: nn.Module) -> bool:
    inner = model.__dict__.get("_modules", {}).get("_orig_mod", model)
    return type(inner) is PeftModel or isinstance(inner, AdaptedModel)


def _modules_of(state_dict: Mapping[str, Tensor]) -> list[str]:
    """The modules that an adapter's tensors belong to."""
    found: dict[str, None] = {}
    for key in state_dict:
        match = re.match(r"(?:base_model\.model\.)?(.+?)\.(?:lora|vera)_\w+(?:\.|$)", key)
        if match:
            found[match[1]] = None
    if not found:
        raise ConfigError("The state_dict has no key of an adapter's tensor, so it does not say what to adapt.")
    return list(found)
