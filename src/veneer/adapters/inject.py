"""Put an adapter into a model: all of it, or nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.index import EVIDENCE, view
from veneer.adapters.invocation import check_tokens
from veneer.adapters.kbit import quantised_slots, settle
from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.lifecycle import remove
from veneer.adapters.rebase import STANDING, initial_tensors
from veneer.adapters.replication import replicated
from veneer.adapters.routing import BASE
from veneer.adapters.saved import ModulesToSaveWrapper
from veneer.adapters.shared import placed
from veneer.adapters.target import Target
from veneer.adapters.targets import Selection, select
from veneer.adapters.ties import TiedFactors
from veneer.core import registry
from veneer.core.base import AbstractBase
from veneer.core.config import PeftConfig, TunerConfig
from veneer.core.errors import UsageError, listed
from veneer.core.init import AbstractInit
from veneer.core.variant import ParameterSpec

_HALF = (torch.float16, torch.bfloat16)


def inject(
    adapted: AdaptedModel,
    name: str,
    config: PeftConfig,
    *,
    selection: Selection | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    shared: Mapping[str, Tensor] | None = None,
    autocast_adapter_dtype: bool = True,
    device: torch.device | str | None = None,
) -> Selection:
    """Add an inactive adapter to a model. After a failure the model is what it was.

    Args:
        adapted: the model and its registry.
        name: the new adapter's name.
        config: what to adapt and how.
        selection: ``select``'s result when it is already known.
        tensors: from layer path to tensors keyed as on disk; without it the config's start fills them.
        shared: tensors that all its layers share, keyed as on disk; without it the variant makes them.
        autocast_adapter_dtype: keep the adapter in float32 on a float16 or bfloat16 base.
        device: where new tensors go instead of beside the base's weight, e.g. "meta".

    Returns:
        What was selected.

    Raises:
        UsageError: the name is taken or no name, or this adapter changes what another one saves whole.
        TargetError, ConfigError: see ``select``.
    """
    check_name(name)
    if name in adapted.peft_config:
        raise UsageError(f"There is already an adapter {name!r}; delete it first, or choose another name.")
    assert isinstance(config, TunerConfig)
    _check_family(adapted, config)
    with replicated(adapted, config, ready=selection is not None):
        return _inject(adapted, name, config, selection, tensors, shared, autocast_adapter_dtype, device)


def _inject(
    adapted: AdaptedModel,
    name: str,
    config: TunerConfig,
    selection: Selection | None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None,
    shared: Mapping[str, Tensor] | None,
    autocast_adapter_dtype: bool,
    device: torch.device | str | None,
) -> Selection:
    selection = selection or select(adapted.index, config)
    if not adapted.peft_config:
        settle(quantised_slots(adapted.index))
    adapted.refuse_overlap([target.slot.path for target in selection.targets], [s.path for s in selection.saved])
    check_tokens(adapted.model, config, (t.slot.path for t in selection.targets), adapted.index.output_path)
    unmerged = {
        path: adapted.layers[path].original if path in adapted.layers else view(target.slot)
        for target in selection.targets
        for path in [target.slot.path]
    }
    fresh = {
        target.slot.path: (
            {}
            if target.tied_to is not None
            else _start(target, unmerged[target.slot.path], selection, autocast_adapter_dtype, device)
            if tensors is None
            else _loaded(
                target, unmerged[target.slot.path], selection, autocast_adapter_dtype, tensors[target.slot.path]
            )
        )
        for target in selection.targets
    }
    layers = {
        target.slot.path: adapted.layers.get(target.slot.path)
        or AdaptedLayer(target.slot.module, target.kind, target.slot.leaf, read=target.slot.read)
        for target in selection.targets
    }
    one: dict[int, object] = {}
    copies = {slot.path: _copy(slot.module, one if slot.path in selection.together else {}) for slot in selection.saved}
    rows = adapted.tokens.fresh(selection.tokens, _whole(adapted, selection), autocast_adapter_dtype, device)
    if shared is None:
        shared = selection.shared
    if shared is None:
        shared = selection.variant.shared([view(t.slot).shape() for t in selection.targets], selection.config)
    shared = placed(selection, shared, _dtype(view(selection.targets[0].slot).placement()[1], autocast_adapter_dtype))
    try:
        adapted.tokens.add(name, selection.tokens, rows)
        adapted.invocations.add(name, config)
        _commit(adapted, name, selection, fresh, layers, copies, shared)
    except BaseException:
        remove(adapted, name)
        raise
    if tensors is None:
        for target in selection.targets:
            target.slot.module.__dict__.pop(EVIDENCE, None)
    return selection


def _whole(adapted: AdaptedModel, selection: Selection) -> list[str]:
    """The modules that adapters change as a whole, this one and those that are there."""
    mine = [*(target.slot for target in selection.targets), *selection.saved]
    return [*adapted.layers, *adapted.saved, *(slot.path for slot in mine)]


def _dtype(own: torch.dtype, widen: bool) -> torch.dtype:
    """The dtype of new tensors beside a weight of this one."""
    return torch.float32 if widen and own in _HALF else own


def check_name(name: str) -> None:
    """Refuse names that cannot be module names or folder names.

    Raises:
        UsageError: the name is not letters, digits, "_", "-" and spaces, or collides with torch's own.
    """
    if name == BASE:
        raise UsageError(f"{name!r} stands for the base model in adapter_names and cannot name an adapter.")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w\- ]*", name):
        raise UsageError(f"{name!r} cannot name an adapter; use letters, digits, '_' and '-'.")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise UsageError(f"{name!r} cannot name an adapter: torch's containers use that word; choose another.")


def _check_family(adapted: AdaptedModel, config: PeftConfig) -> None:
    """One model holds one family of variants: another one keeps tensors of another kind under the same names."""
    there = {other.peft_type for other in adapted.peft_config.values()} - {config.peft_type}
    if there:
        raise UsageError(
            f"This model has adapters of type {listed(map(str, there))}; one of type {config.peft_type} cannot stand "
            "beside them. Merge them first, or load the adapter onto a model of its own."
        )


def _start(
    target: Target, base: AbstractBase, selection: Selection, widen: bool, device: torch.device | str | None
) -> dict[str, Tensor]:
    init: AbstractInit = registry.load("inits", selection.config.init).Init()
    here, own = base.placement()
    dtype = _dtype(own, widen)
    # What a start takes from W is no file's to bring, so it is made at once.
    where = here if device is None or init.subtracts or init.moves else torch.device(device)
    fresh = {key: torch.empty(spec.shape, dtype=dtype, device=where) for key, spec in target.specs.items()}
    if where.type == "meta":
        return fresh
    with torch.no_grad():
        moved = selection.variant.start(
            base, fresh, init, scaling=target.scaling, config=selection.config, evidence=target.slot.evidence()
        )
        if moved is not None:
            target.specs[STANDING] = ParameterSpec(tuple(moved.shape), trainable=False, saved=False)
            fresh[STANDING] = moved
        if init.subtracts:
            fresh |= initial_tensors(base, fresh, target.scaling)
    return fresh


def _loaded(
    target: Target, base: AbstractBase, selection: Selection, widen: bool, given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a file; what it does not hold is made as it was made when the adapter started."""
    cast = _cast(given, target, widen)
    if target.specs.keys() == given.keys() and not registry.load("inits", selection.config.init).Init.moves:
        return cast
    return _start(target, base, selection, widen, None) | cast


def _cast(given: Mapping[str, Tensor], target: Target, widen: bool) -> dict[str, Tensor]:
    """Loaded tensors keep their dtype, except that halves follow PEFT's rule; they move to the base's device.

    Beside a base without values, on the meta device, they stay where they are and keep their own.
    """
    there, _ = view(target.slot).placement()
    device = None if there.type == "meta" else there
    # A copy: a tensor that lies in the mapped file is not aligned, and products of it may round otherwise.
    return {
        key: tensor.to(
            device=device, dtype=torch.float32 if widen and tensor.dtype in _HALF else tensor.dtype, copy=True
        )
        for key, tensor in given.items()
    }


def _copy(module: nn.Module, copied: dict[int, object]) -> nn.Module:
    duplicate = copy.deepcopy(module, copied)
    return duplicate.requires_grad_(False)


def _commit(
    adapted: AdaptedModel,
    name: str,
    selection: Selection,
    fresh: dict[str, dict[str, Tensor]],
    layers: dict[str, AdaptedLayer],
    copies: dict[str, nn.Module],
    shared: Mapping[str, Tensor],
) -> None:
    config = selection.config
    first = not adapted.peft_config
    adapted.peft_config[name] = config
    adapted.reports[name] = selection.report
    adapted.shared.put(name, shared)
    for target in selection.targets:
        path = target.slot.path
        layers[path].attach(
            name,
            selection.variant,
            target.specs,
            fresh[path],
            shared=adapted.shared if target.tied_to is None else TiedFactors(layers[target.tied_to]),  # type: ignore[arg-type]
            r=target.r,
            lora_alpha=target.lora_alpha,
            scaling=target.scaling,
            dropout=config.dropout,
        )
        layers[path].router = adapted.router
        adapted.layers.setdefault(path, layers[path])
    adapted.wrap(layers)
    for slot in selection.saved:
        if slot.path not in adapted.saved:
            adapted.saved[slot.path] = ModulesToSaveWrapper(slot.module, adapted.router)
            adapted.hang(slot.path, adapted.saved[slot.path])
        adapted.saved[slot.path].modules_to_save[name] = copies[slot.path]
    if selection.biases:
        places = {key: _bias_place(adapted, key) for key in selection.biases}
        adapted.biases.add(name, places, {key: adapted.original(key) for key in places})
    if first:
        for module in (adapted.model, *(slot.module for slot in adapted.index.slots.values())):
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.requires_grad = False


def _bias_place(adapted: AdaptedModel, key: str) -> tuple[nn.Module, str]:
    path, _, leaf = key.rpartition(".")
    return (adapted.index.slots[path].module if path else adapted.model), leaf
