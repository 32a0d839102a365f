"""What the adapters of a model are doing at the moment, layer by layer and in all, under PEFT's names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.index import shape_of
from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.saved import ModulesToSaveWrapper
from veneer.adapters.tokens import TokenAdapter
from veneer.core.base import QuantisedBase

T = TypeVar("T")
Irregular = Literal["irregular"]
"""Stands for a value that is not the same everywhere."""

_LAYER_NAMES = {
    "linear": "Linear",
    "conv1d": "Linear",
    "embedding": "Embedding",
    "attention": "MultiheadAttention",
    "parameter": "ParamWrapper",
}
_MODEL_NAMES = {"LORA": "LoraModel", "ADALORA": "AdaLoraModel", "VERA": "VeraModel"}
_BACKENDS = {"bnb_4bit": "bnb 4bit", "bnb_8bit": "bnb 8bit"}


@dataclass
class TunerLayerStatus:
    """One module that holds adapters: an adapted layer, a module saved whole, or a table with trained rows."""

    name: str
    """Its path below ``PeftModel.base_model``, or in the model that adapters were injected into."""
    module_type: str
    """What it is, in PEFT's words: "lora.Linear", "ModulesToSaveWrapper", ..."""
    enabled: bool
    """Whether its adapters are part of the forward pass."""
    active_adapters: list[str]
    """The adapters that are active in the model, whether they are on this module or not."""
    merged_adapters: list[str]
    """The adapters that are merged into its weight."""
    requires_grad: dict[str, bool | Irregular]
    """Whether the parameters of each of its adapters learn."""
    available_adapters: list[str]
    """The adapters on it, sorted."""
    devices: dict[str, list[str]]
    """From adapter to the kinds of device that its tensors here are on."""
    quantization_backend: str | None
    """What quantised the frozen weight, e.g. "bnb 4bit"; None when nothing did."""


@dataclass
class TunerModelStatus:
    """All modules with adapters together; what differs between them is "irregular"."""

    base_model_type: str
    """The class of the adapted model."""
    adapter_model_type: str
    """The family's class in PEFT, e.g. "LoraModel"; "None" for a model that is no ``PeftModel``."""
    peft_types: dict[str, str]
    """From adapter to its ``peft_type``; empty for a model that is no ``PeftModel``."""
    trainable_params: int
    """Parameters that learn."""
    total_params: int
    """Parameters of the model in use."""
    num_adapter_layers: int
    """How many modules hold adapters."""
    enabled: bool | Irregular
    """Whether the adapters are part of the forward pass."""
    active_adapters: list[str] | Irregular
    """The active adapters."""
    merged_adapters: list[str] | Irregular
    """The adapters that are merged; irregular when one is merged in a part of its layers only."""
    requires_grad: dict[str, bool | Irregular]
    """Whether the parameters of each adapter learn."""
    available_adapters: list[str]
    """All adapters, sorted."""
    devices: dict[str, list[str]]
    """From adapter to the kinds of device that its tensors are on."""
    quantization_backend: str | Irregular | None
    """What quantised the frozen weights."""


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every module that holds adapters, in the model's order.

    >>> get_layer_status(peft_model)[0].requires_grad
    {"default": True}

    Args:
        model: a ``PeftModel``, or a model that adapters were injected into.

    Raises:
        UsageError: the model has no adapters.
    """
    adapted, root = _find(model)
    return [_layer_status(name, module, adapted) for name, module in _holders(root)]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapters of a model together.

    As PEFT's, but for one thing: a module saved whole has nothing to merge, so that a merged adapter which has such
    modules is told as merged, and not as irregular.

    Args:
        model: a ``PeftModel``, or a model that adapters were injected into.

    Raises:
        UsageError: the model has no adapters.
    """
    adapted, root = _find(model)
    layers = get_layer_status(model)
    wrapped = root is adapted
    families = {str(config.peft_type): None for config in adapted.peft_config.values()}
    if wrapped:
        trainable, total = model.get_nb_trainable_parameters()  # type: ignore[operator]
    else:
        sizes = [(math.prod(shape_of(p)), p.requires_grad) for p in model.parameters()]
        trainable, total = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    return TunerModelStatus(
        base_model_type=type(adapted.model).__name__ if wrapped or hasattr(model, "config") else "other",
        adapter_model_type=_family(families) if wrapped else "None",
        peft_types={name: str(config.peft_type) for name, config in adapted.peft_config.items()} if wrapped else {},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same([layer.enabled for layer in layers]),
        active_adapters=_same([layer.active_adapters for layer in layers]),
        merged_adapters=_merged(layers),
        requires_grad=_together(layer.requires_grad for layer in layers),
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices=_devices((name, kind) for layer in layers for name, kinds in layer.devices.items() for kind in kinds),
        quantization_backend=_same([layer.quantization_backend for layer in layers]),
    )


def _find(model: nn.Module) -> tuple[AdaptedModel, nn.Module]:
    """The adapters of a model, and the module that names are told from."""
    # It imports the facade, which has methods for what is in this file.
    from veneer.adapters.injected import adapted_of

    adapted = adapted_of(model)
    return adapted, adapted if hasattr(model, "base_model") and model.base_model is adapted else adapted.model


def _holders(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in root.named_modules():
        if isinstance(module, AdaptedLayer | ModulesToSaveWrapper | TokenAdapter):
            yield name, module


def _layer_status(name: str, module: nn.Module, adapted: AdaptedModel) -> TunerLayerStatus:
    tensors: dict[str, list[nn.Parameter]] = {}
    merged: list[str] = []
    kind, backend = type(module).__name__, None
    if isinstance(module, AdaptedLayer):
        for adapter, specs in module.specs.items():
            own = module.tensors(adapter)
            tensors[adapter] = [own[key] for key, spec in specs.items() if spec.trainable]
        kind, backend, merged = _layer_name(module), _backend(module), list(module.merged_adapters)
    elif isinstance(module, ModulesToSaveWrapper):
        tensors = {adapter: list(copy.parameters()) for adapter, copy in module.modules_to_save.items()}
    elif isinstance(module, TokenAdapter):
        tensors = {adapter: [rows] for adapter, rows in module.trainable_tokens_delta.items()}
        merged = [adapter for adapter in adapted.tokens.merged if adapter in tensors]
        kind = "TrainableTokensLayer"
    return TunerLayerStatus(
        name=name,
        module_type=kind,
        enabled=adapted.enabled,
        active_adapters=list(adapted.active_adapters),
        merged_adapters=merged,
        requires_grad={adapter: _same([p.requires_grad for p in own]) for adapter, own in tensors.items()},
        available_adapters=sorted(tensors),
        devices=_devices((adapter, p.device.type) for adapter, own in tensors.items() for p in own),
        quantization_backend=backend,
    )


def _layer_name(layer: AdaptedLayer) -> str:
    """PEFT's name of a layer's class, with that of its family."""
    family = next(type(variant).__module__.rpartition(".")[2] for variant in layer.variants.values())
    name = _LAYER_NAMES.get(layer.kind, type(layer.get_base_layer()).__name__)
    if family == "adalora":
        return f"adalora.SVD{name}"
    return f"vera.{name}" if family == "vera" else f"lora.{name}"


def _backend(layer: AdaptedLayer) -> str | None:
    if not issubclass(layer.base_class, QuantisedBase):
        return None
    package = type(layer.get_base_layer()).__module__.partition(".")[0]
    return _BACKENDS.get(layer.kind, package)


def _family(names: Iterable[str]) -> str:
    return next((_MODEL_NAMES.get(name, f"{name.capitalize()}Model") for name in names), "None")


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    mergeable = [layer for layer in layers if layer.module_type != ModulesToSaveWrapper.__name__]
    anywhere = {name for layer in mergeable for name in layer.merged_adapters}
    partly = any(anywhere & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in mergeable)
    return "irregular" if partly else sorted(anywhere)


def _same(values: list[T]) -> T | Irregular:
    first = values[0]
    return first if all(value == first for value in values) else "irregular"


def _together(several: Iterable[Mapping[str, bool | Irregular]]) -> dict[str, bool | Irregular]:
    found: dict[str, list[bool | Irregular]] = {}
    for mapping in several:
        for name, value in mapping.items():
            found.setdefault(name, []).append(value)
    return {name: _same(values) for name, values in found.items()}


def _devices(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for name, kind in pairs:
        found.setdefault(name, set()).add(kind)
    return {name: sorted(kinds) for name, kinds in found.items()}
