"""Switch adapters on and off, activate several, rename or remove one; the base model comes back exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.layer import AdaptedLayer, relabel
from veneer.adapters.merge import merge, merged_names, unmerge
from veneer.core.errors import UsageError, listed
from veneer.core.variant import ParameterSpec


def activate(adapted: AdaptedModel, names: str | Sequence[str], *, trainable: bool = True) -> None:
    """Make these adapters, and no others, part of the forward pass.

    Args:
        adapted: the model and its registry.
        names: one name, or several whose updates add up.
        trainable: whether the parameters of these adapters require gradients; all others do not.

    Raises:
        UsageError: a name that is not there, none or twice the same, or two adapters that both bring their own
            copy of a whole module or of the base's biases: only one of them can be in use.
    """
    wanted = _together(adapted, names)
    if merged_names(adapted):
        warnings.warn("Adapters were merged; they are unmerged before others become active.", stacklevel=4)
        unmerge(adapted)
    _use(adapted, wanted)
    set_trainable(adapted, wanted if trainable else [])


def _together(adapted: AdaptedModel, names: str | Sequence[str]) -> list[str]:
    """The names as a list, when these adapters can be active together; see ``activate``."""
    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise UsageError("No adapter was named; to run without any, use disable_adapter().")
    if len(set(wanted)) != len(wanted):
        raise UsageError(f"The same adapter is named twice: {listed(wanted)}.")
    for name in wanted:
        adapted.require(name)
    owners = {path: [n for n in wanted if n in wrapper.modules_to_save] for path, wrapper in adapted.saved.items()}
    for path, several in owners.items():
        if len(several) > 1:
            raise UsageError(
                f"Adapters {listed(several)} each have their own {path!r}; only one of them can be active at a time."
            )
    biased = [name for name in wanted if name in adapted.biases.trained]
    if len(biased) > 1:
        raise UsageError(f"Adapters {listed(biased)} each train the base's biases; only one can be active at a time.")
    adapted.tokens.check_together(wanted)
    return wanted


def _use(adapted: AdaptedModel, names: list[str]) -> None:
    adapted.active_adapters = names
    for layer in adapted.layers.values():
        layer.active_adapters = [name for name in names if name in layer.specs]
        layer.refresh()
    show_whole(adapted)


def set_trainable(adapted: AdaptedModel, names: Sequence[str]) -> None:
    """Let the parameters of these adapters learn, and of no others."""
    for layer in adapted.layers.values():
        _learn_alone(layer, names)
    for wrapper in adapted.saved.values():
        for name, module in wrapper.modules_to_save.items():
            module.requires_grad_(name in names)
    adapted.tokens.set_trainable(names)
    learning = {key for name in names for key in adapted.biases.trained.get(name, ())}
    for key in adapted.biases.places:
        adapted.biases.parameter(key).requires_grad_(key in learning)


def set_requires_grad(adapted: AdaptedModel, names: str | Sequence[str], on: bool) -> None:
    """Let the parameters of these adapters learn, or not, and leave those of all others as they are.

    Raises:
        UsageError: an unknown name, or an adapter whose biases are not in the model because it is not active.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        adapted.require(name)
        if on and name in adapted.biases.trained and adapted.biases.shown != name:
            raise UsageError(
                f"{name!r} trains the base's biases, which hold its values only while it is active; activate it first."
            )
    for name in wanted:
        for rows in adapted.tokens.of(name).values():
            rows.requires_grad_(on)
        for layer in adapted.layers_of(name).values():
            _learn(layer, name, on, layer.specs[name])
        for wrapper in adapted.saved_of(name).values():
            wrapper.modules_to_save[name].requires_grad_(on)
        if adapted.biases.shown == name:
            for key in adapted.biases.trained[name]:
                adapted.biases.parameter(key).requires_grad_(on)


def _learn_alone(layer: AdaptedLayer, names: Sequence[str]) -> None:
    """Of all tensors of a layer's adapters, let these learn: a glance at each, for there may be a hundred adapters."""
    for container, held in layer._modules.items():
        if container == "base_layer":
            continue
        own: Any = held
        named = (
            (
                (name, f"{container}.{leaf}", p)
                for name, one in own._modules.items()
                for leaf, p in one._parameters.items()
            )
            if isinstance(held, nn.ModuleDict)
            else ((name, container, p) for name, p in own._parameters.items())
        )
        for name, key, parameter in named:
            if parameter is not None and (parameter.requires_grad or name in names):
                parameter.requires_grad_(name in names and layer.specs[name][key].trainable)


def _learn(layer: AdaptedLayer, name: str, on: bool, specs: dict[str, ParameterSpec]) -> None:
    for key, parameter in layer.tensors(name).items():
        if parameter.requires_grad != (on and specs[key].trainable):
            parameter.requires_grad_(not parameter.requires_grad)


def enable(adapted: AdaptedModel, on: bool) -> None:
    """Switch all adapters on or off, without changing which are active."""
    adapted.enabled = on
    for layer in adapted.layers.values():
        layer.disable_adapters = not on
        layer.refresh()
    show_whole(adapted)


def show_whole(adapted: AdaptedModel) -> None:
    """Bring whole modules, trained rows and biases in line with what is active."""
    active = adapted.active_adapters if adapted.enabled else []
    for wrapper in adapted.saved.values():
        wrapper.active = next((name for name in active if name in wrapper.modules_to_save), None)
    adapted.tokens.show(active)
    adapted.invocations.show(active)
    adapted.biases.show(next((name for name in active if name in adapted.biases.trained), None))


@contextmanager
def disabled(adapted: AdaptedModel) -> Iterator[None]:
    """The base model alone, for the length of a with block.

    Adapters that were merged are merged again after it, unless the block made others active.
    """
    merged, active, was_enabled = merged_names(adapted), adapted.active_adapters, adapted.enabled
    unmerge(adapted)
    enable(adapted, False)
    try:
        yield
    finally:
        enable(adapted, was_enabled)
        if adapted.active_adapters == active:
            _merge_again(adapted, merged)


@contextmanager
def using(adapted: AdaptedModel, names: str | Sequence[str]) -> Iterator[None]:
    """These adapters alone, for the length of a with block, also inside one that disables all.

    After it, and after an error in it, what was active, enabled and merged is so again. Which parameters learn does
    not change: the block is not a switch of what is trained.

    Raises:
        UsageError: see ``activate``. Nothing has changed then.
    """
    wanted = _together(adapted, names)
    merged, active, was_enabled = merged_names(adapted), adapted.active_adapters, adapted.enabled
    unmerge(adapted)
    adapted.enabled = True
    for layer in adapted.layers.values():
        layer.disable_adapters = False
    _use(adapted, wanted)
    try:
        yield
    finally:
        unmerge(adapted)
        # The block may have renamed or deleted what was active before.
        left = [name for name in active if name in adapted.peft_config]
        _use(adapted, left or adapted.active_adapters)
        enable(adapted, was_enabled)
        _merge_again(adapted, merged)


def _merge_again(adapted: AdaptedModel, names: Sequence[str]) -> None:
    left = [name for name in names if name in adapted.peft_config]
    if left and adapted.enabled:
        merge(adapted, left, into=adapted.merged_into)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of every adapter of a model, for the length of a with block.

    With a multiplier between 0 and 1 the model moves from the base to the adapted one (PEFT's function of this name).

    >>> with rescale_adapter_scale(model, 0.5):
    ...     half_way = model(**batch)

    Raises:
        UsageError: the multiplier is no number, the model has no adapter, or one is merged, whose scaling is fixed.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
        raise UsageError(f"The multiplier of a scaling must be a number, not {multiplier!r}.")
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    if not layers:
        raise UsageError(f"This {type(model).__name__} has no adapter whose scaling could be changed.")
    if any(layer.merged_adapters for layer in layers):
        raise UsageError("An adapter is merged, so its scaling is part of the weights; call unmerge_adapter() first.")
    before = [(layer, name, scaling) for layer in layers for name, scaling in layer.scaling.items()]
    for layer, name, scaling in before:
        layer.set_scaling(name, scaling * multiplier)
    try:
        yield
    finally:
        for layer, name, scaling in before:
            if name in layer.scaling:
                layer.set_scaling(name, scaling)


def rename(adapted: AdaptedModel, old: str, new: str) -> None:
    """Give an adapter another name. Its tensors are the same objects, so an optimiser keeps them.

    Raises:
        UsageError: there is no adapter of the old name, or the new one is taken.
    """
    adapted.require(old)
    if new == old:
        return
    if new in adapted.peft_config:
        raise UsageError(f"There is already an adapter {new!r}; delete it first, or choose another name.")
    for layer in adapted.layers.values():
        layer.rename(old, new)
    for wrapper in adapted.saved.values():
        if old in wrapper.modules_to_save:
            relabel(wrapper.modules_to_save, old, new)
        wrapper.active = new if wrapper.active == old else wrapper.active
    adapted.biases.rename(old, new)
    adapted.shared.rename(old, new)
    adapted.tokens.rename(old, new)
    adapted.invocations.rename(old, new)
    relabel(adapted.peft_config, old, new)
    relabel(adapted.reports, old, new)
    adapted.active_adapters = [new if name == old else name for name in adapted.active_adapters]


def delete(adapted: AdaptedModel, name: str) -> None:
    """Remove an adapter that is not active; what else is active or merged stays so.

    PEFT activates another adapter in the place of one that is deleted: the model would go on with an adapter that
    nobody asked for.

    Raises:
        UsageError: an unknown name, or an active adapter. The model is what it was.
    """
    adapted.require(name)
    if name in adapted.active_adapters:
        others = [other for other in adapted.peft_config if other not in adapted.active_adapters]
        way = f"set_adapter({others[0]!r}) first" if others else "add or activate another one first"
        if len(adapted.peft_config) == 1:
            way = "it is the only one, and unload() gives the base model back"
        raise UsageError(f"{name!r} is active and cannot be deleted; {way}.")
    still = [other for other in merged_names(adapted) if other != name]
    unmerge(adapted)
    remove(adapted, name)
    _merge_again(adapted, still)


def remove(adapted: AdaptedModel, name: str) -> None:
    """Forget an adapter: its tensors, its whole modules, its biases. Layers without any adapter are unwrapped."""
    for path, layer in list(adapted.layers.items()):
        layer.detach(name)
        if not layer.specs:
            del adapted.layers[path]
            adapted.wrap([path])
    for path, wrapper in list(adapted.saved.items()):
        if wrapper.active == name:
            wrapper.active = None
        if name in wrapper.modules_to_save:
            del wrapper.modules_to_save[name]
        if not len(wrapper.modules_to_save):
            adapted.hang(path, wrapper.original_module)
            del adapted.saved[path]
    adapted.biases.remove(name)
    adapted.tokens.remove(name)
    adapted.invocations.remove(name)
    adapted.shared.drop(name)
    adapted.peft_config.pop(name, None)
    adapted.reports.pop(name, None)
    adapted.active_adapters = [active for active in adapted.active_adapters if active != name]
