"""Switch adapters on and off, activate several, remove one; the base model comes back exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.merge import merge, merged_names, unmerge
from veneer.core.errors import UsageError, listed


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
    if any(layer.merged_adapters for layer in adapted.layers.values()):
        warnings.warn("Adapters were merged; they are unmerged before others become active.", stacklevel=4)
        unmerge(adapted)

    adapted.active_adapters = wanted
    for layer in adapted.layers.values():
        layer.active_adapters = [name for name in wanted if name in layer.specs]
        layer.refresh()
    show_whole(adapted)
    set_trainable(adapted, wanted if trainable else [])


def set_trainable(adapted: AdaptedModel, names: Sequence[str]) -> None:
    """Let the parameters of these adapters learn, and of no others."""
    for layer in adapted.layers.values():
        for name, specs in layer.specs.items():
            for key, parameter in layer.tensors(name).items():
                parameter.requires_grad_(name in names and specs[key].trainable)
    for wrapper in adapted.saved.values():
        for name, module in wrapper.modules_to_save.items():
            module.requires_grad_(name in names)
    learning = {key for name in names for key in adapted.biases.trained.get(name, ())}
    for key in adapted.biases.places:
        adapted.biases.parameter(key).requires_grad_(key in learning)


def enable(adapted: AdaptedModel, on: bool) -> None:
    """Switch all adapters on or off, without changing which are active."""
    adapted.enabled = on
    for layer in adapted.layers.values():
        layer.disable_adapters = not on
        layer.refresh()
    show_whole(adapted)


def show_whole(adapted: AdaptedModel) -> None:
    """Bring whole modules and biases in line with what is active."""
    active = adapted.active_adapters if adapted.enabled else []
    for wrapper in adapted.saved.values():
        wrapper.active = next((name for name in active if name in wrapper.modules_to_save), None)
    adapted.biases.show(next((name for name in active if name in adapted.biases.trained), None))


@contextmanager
def disabled(adapted: AdaptedModel) -> Iterator[None]:
    """The base model alone, for the length of a with block; merged adapters are merged again after it."""
    merged = merged_names(adapted)
    was_enabled = adapted.enabled
    if merged:
        unmerge(adapted)
    enable(adapted, False)
    try:
        yield
    finally:
        enable(adapted, was_enabled)
        if merged:
            merge(adapted, merged)


def delete(adapted: AdaptedModel, name: str) -> None:
    """Remove an adapter that others stand beside; what else is active or merged stays so.

    When it was the only active one, the first that is left becomes active.

    Raises:
        UsageError: an unknown name, or the last adapter.
    """
    adapted.require(name)
    if len(adapted.peft_config) == 1:
        raise UsageError(f"{name!r} is the only adapter; unload() gives the base model back.")
    still = [other for other in merged_names(adapted) if other != name]
    unmerge(adapted)
    remove(adapted, name)
    if not adapted.active_adapters:
        activate(adapted, next(iter(adapted.peft_config)))
    if still:
        merge(adapted, still)


def remove(adapted: AdaptedModel, name: str) -> None:
    """Forget an adapter: its tensors, its whole modules, its biases. Layers without any adapter are unwrapped."""
    for path, layer in list(adapted.layers.items()):
        layer.detach(name)
        if not layer.specs:
            adapted.hang(path, layer.base_layer)
            del adapted.layers[path]
    for path, wrapper in list(adapted.saved.items()):
        if wrapper.active == name:
            wrapper.active = None
        if name in wrapper.modules_to_save:
            del wrapper.modules_to_save[name]
        if not len(wrapper.modules_to_save):
            adapted.hang(path, wrapper.original_module)
            del adapted.saved[path]
    adapted.biases.remove(name)
    adapted.shared.drop(name)
    adapted.peft_config.pop(name, None)
    adapted.reports.pop(name, None)
    adapted.active_adapters = [active for active in adapted.active_adapters if active != name]
