"""Models whose weights are stored in a few bits: made ready for training, kept as they are, merged on demand.

Merging ``W + dW`` back into 4 bits rounds most of the update away, so that is never done without being asked for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.index import ModuleIndex, Slot, view
from veneer.adapters.layer import AdaptedLayer
from veneer.core import registry
from veneer.core.base import Into, QuantisedBase, as_parameter, merge_dtype, plain_linear
from veneer.core.errors import MergeError, UsageError, nearest
from veneer.core.parametrised import shell

INTO: tuple[Into, ...] = get_args(Into)

_HALF = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make a quantised model ready for an adapter, as PEFT's function of this name does.

    Everything is frozen; what is stored in 16 bits (norms, embeddings, the head) is widened to float32; and with
    checkpointing, gradients are let in through the frozen embeddings.

    >>> model = get_peft_model(prepare_model_for_kbit_training(model), config)

    Args:
        model: a transformers model; it is changed in place.
        use_gradient_checkpointing: compute activations again in the backward pass of a quantised model.
        gradient_checkpointing_kwargs: options of ``torch.utils.checkpoint``; ``{"use_reentrant": False}`` where
            none are given.

    Returns:
        The same model.

    Raises:
        UsageError: the model does not support gradient checkpointing, or is adapted already.
    """
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise UsageError("This model is adapted already; prepare_model_for_kbit_training comes before get_peft_model.")
    quantised = quantised_slots(ModuleIndex(model))
    own = {id(p) for slot in quantised for p in slot.module._parameters.values()}
    model.requires_grad_(False)
    if use_gradient_checkpointing and quantised:
        _checkpoint(model, {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
    for parameter in model.parameters():
        if parameter.dtype in _HALF and id(parameter) not in own:
            parameter.data = parameter.data.to(torch.float32)
    settle(quantised)
    return model


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"{type(model).__name__} does not support gradient checkpointing; give use_gradient_checkpointing=False."
        )
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        # transformers renamed this within version 5; the old name works in all of 5.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def quantised_slots(index: ModuleIndex) -> list[Slot]:
    """The layers of a model that are stored in a few bits."""
    return [slot for slot in index.slots.values() if slot.kind and isinstance(view(slot), QuantisedBase)]


def bytes_per_weight(slots: Iterable[Slot]) -> float | None:
    """Bytes that quantised layers take for each of their weights, scales and tables included; None without any."""
    weights, held = 0, {}
    for slot in slots:
        base = view(slot)
        assert isinstance(base, QuantisedBase)
        weights += math.prod(base.shape())
        held.update({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in base.stored()})
    return sum(held.values()) / weights if weights else None


def settle(slots: Iterable[Slot]) -> None:
    """Keep quantised layers, adapted or not, from rewriting their weights: gradients flow through all of them."""
    bases = (view(slot) for slot in slots)
    changed = [base for base in bases if isinstance(base, QuantisedBase) and base.settle()]
    if changed:
        warnings.warn(
            f"{len(changed)} quantised layers were called in evaluation mode before they were adapted, which made "
            f"their library round the scales of their weights; to train on the exact ones, load the model again.",
            stacklevel=4,
        )


# Merging


def check_into(adapted: AdaptedModel, paths: Iterable[str], into: Into | None) -> None:
    """Refuse a merge into quantised layers that was not asked for, or that they cannot do.

    Raises:
        MergeError: no ``into`` for a layer that is quantised, or one that it does not support.
        UsageError: an ``into`` that does not exist, or has no layer to apply to.
    """
    if into is not None and into not in INTO:
        raise UsageError(f"into is {into!r}; expected {' or '.join(map(repr, INTO))}.{nearest(str(into), INTO)}")
    originals = {path: adapted.layers[path].original for path in paths}
    quantised = {path: base for path, base in originals.items() if isinstance(base, QuantisedBase)}
    if into is None and quantised:
        path, base = next(iter(quantised.items()))
        raise MergeError(
            f"{path!r} is quantised (a {type(base.module).__name__}), and rounding W + dW to its few bits would lose "
            "much of the update. Merge into the full-precision base (veneer merge --adapter ADAPTER --model BASE), or "
            "choose into='dequantised' for plain layers, or into='requantised' for quantised ones at that loss."
        )
    if into is not None and not quantised:
        raise UsageError(f"into={into!r} has no meaning here: none of the adapted layers is quantised; leave it out.")
    if into is not None:
        for base in quantised.values():
            base.check_merge(into)


def merge_quantised(
    adapted: AdaptedModel, layer: AdaptedLayer, names: list[str], into: Into, bias_O: Tensor | None
) -> None:
    """Let another module stand in for a quantised layer, with these adapters in its weight and this bias."""
    base = layer.original
    assert isinstance(base, QuantisedBase)
    W_OI = base.weight()
    merged = layer.changed(W_OI.to(merge_dtype(W_OI)), names)
    if into == "dequantised":
        dtype = _dtype_around(adapted, base)
        bias_O = bias_O if bias_O is None or bias_O.dtype == dtype else bias_O.to(dtype)
        layer.stand_in(plain_linear(merged.to(dtype), bias_O), registry.load("bases", "linear").Base)
        return
    twin = shell(base.module)
    type(base)(twin, base.leaf).replace(merged)
    if bias_O is not None:
        twin._parameters[str(base.bias_name())] = as_parameter(bias_O)
    layer.stand_in(twin, type(base))


def _dtype_around(adapted: AdaptedModel, base: QuantisedBase) -> torch.dtype:
    """The dtype that plain layers compute in here. A quantised layer takes any, so it is the embeddings that set it."""
    path, name = adapted.index.input_path, base.bias_name()
    table = adapted.index.slots[path].module._parameters.get("weight") if path else None
    bias = base.module._parameters[name] if name else None
    known = [tensor.dtype for tensor in (table, bias) if tensor is not None and tensor.is_floating_point()]
    return known[0] if known else base.placement()[1]


def mark_merged(adapted: AdaptedModel, dequantised: Iterable[str]) -> None:
    """Tell a Hugging Face model which of its layers are no longer quantised, so that it is saved and loads again."""
    model: Any = adapted.model
    quantiser = getattr(model, "hf_quantizer", None)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantiser is None or config is None:
        return
    # transformers cannot undo on saving how it read quantised files, and need not: the layers save themselves.
    readers = [reader.source_patterns for reader in quantiser.get_weight_conversions()]
    known = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [conversion for conversion in known if conversion.source_patterns not in readers]
    done = set(dequantised)
    if {slot.path for slot in quantised_slots(adapted.index)} - done:
        field = "llm_int8_skip_modules" if hasattr(config, "llm_int8_skip_modules") else "modules_to_not_convert"
        left_out = getattr(quantiser, "modules_to_not_convert", None) or getattr(config, field, None) or []
        setattr(config, field, sorted({*left_out, *done}))
        return
    quantiser.remove_quantization_config(model)
    for said in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, said, False):
            setattr(model, said, False)
