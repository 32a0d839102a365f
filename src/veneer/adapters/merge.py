"""Merge adapters into the base's weights and take them out again, bit for bit.

A merged layer gets a new weight parameter instead of having the old one written over. Kept aside, the old
one makes unmerging exact; and a weight that is shared with another module (tied embeddings) stays there
what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.kbit import check_into, mark_merged, merge_quantised
from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.ties import keeps_tied, tie_merged
from veneer.core.base import Into, QuantisedBase
from veneer.core.errors import MergeError, UsageError, listed
from veneer.core.parametrised import hold, holder_of, move, settle


def merge(
    adapted: AdaptedModel,
    names: Sequence[str] | None = None,
    *,
    safe_merge: bool = False,
    reversible: bool = True,
    into: Into | None = None,
) -> None:
    """Merge adapters into the weights of their layers: all active ones, or those named.

    Active adapters that are not merged stay part of the forward pass.

    Args:
        adapted: the model and its registry.
        names: adapters to merge, on top of any already merged.
        safe_merge: check first that every merged weight is finite.
        reversible: keep the original weights, which costs their memory a second time, so that ``unmerge``
            gives them back.
        into: what quantised layers become, plain ("dequantised") or quantised again ("requantised").

    Raises:
        UsageError: a name that is not there or already merged, or the adapters are disabled.
        MergeError: a layer that cannot hold the merged update, or a result that is not finite. Nothing is
            merged then.
    """
    wanted = list(dict.fromkeys(adapted.active_adapters if names is None else names))
    for name in wanted:
        adapted.require(name)
    if not adapted.enabled:
        raise UsageError("The adapters are disabled; merge after the disable_adapter() block.")
    again = [name for name in wanted if name in merged_names(adapted)]
    if again:
        raise UsageError(f"Already merged: {listed(again)}.")
    rows = adapted.tokens.ready(merged_names(adapted), wanted, safe_merge)
    plan = {
        path: [name for name in wanted if name in layer.specs]
        for path, layer in adapted.layers.items()
        if any(name in layer.specs for name in wanted)
    }
    check_into(adapted, plan, into)
    for path, here in plan.items():
        _check(adapted, path, here, safe_merge)
    try:
        for path, here in plan.items():
            _merge_layer(adapted, adapted.layers[path], here, reversible, into)
        tie_merged(adapted)
        adapted.tokens.merge(wanted, reversible=reversible)
    except BaseException:
        # Out of memory or an interrupt halfway: what can be given back is given back.
        adapted.tokens.restore()
        adapted.tokens.merge(rows, reversible=True)
        for path in plan:
            layer = adapted.layers[path]
            if layer.unmerged is not None or layer.aside is not None:
                left = [name for name in layer.merged_adapters if name not in wanted]
                _restore(layer)
                _merge_layer(adapted, layer, left, True, into)
        raise
    adapted.merged_into = into


def merged_names(adapted: AdaptedModel) -> list[str]:
    """The adapters that are merged into the weights at the moment."""
    return list(dict.fromkeys(name for layer in adapted.layers.values() for name in layer.merged_adapters))


def unmerge(adapted: AdaptedModel) -> None:
    """Give every merged layer its original weight back, the very same tensor."""
    for layer in adapted.layers.values():
        _restore(layer)
    adapted.tokens.restore()
    adapted.tokens.show(adapted.active_adapters if adapted.enabled else [])


def unload(
    adapted: AdaptedModel, *, merged: Sequence[str], safe_merge: bool = False, into: Into | None = None
) -> nn.Module:
    """Merge these adapters for good, take all wrappers out, and return the base model.

    The whole modules and biases of the merged adapters stay in the model. No second copy of a weight is kept.

    Args:
        adapted: the model and its registry, which is of no use afterwards.
        merged: adapters to leave in the model; none gives the base model back as it was.
        safe_merge: check first that every merged weight is finite.
        into: what quantised layers become; see ``merge``.

    Raises:
        MergeError: see ``merge``; also when merging would untie embeddings that an encoder-decoder model
            computes with as one. Nothing has changed then.
    """
    unties = untied_by(adapted, merged)
    were_merged, shown, were_into = merged_names(adapted), adapted.biases.shown, adapted.merged_into
    unmerge(adapted)
    try:
        # Before merging: a lora_bias is merged into the bias that goes with it.
        adapted.biases.show(next((name for name in merged if name in adapted.biases.trained), None))
        if merged:
            merge(adapted, merged, safe_merge=safe_merge, reversible=False, into=into)
    except BaseException:
        adapted.biases.show(shown)
        if were_merged:
            merge(adapted, were_merged, into=were_into)
        raise
    for path, layer in adapted.layers.items():
        settle(layer.get_base_layer(), layer.leaf)
        adapted.hang(path, layer.get_base_layer())
    for path, wrapper in adapted.saved.items():
        kept = next((name for name in merged if name in wrapper.modules_to_save), None)
        adapted.hang(path, wrapper.original_module if kept is None else wrapper.modules_to_save[kept])
    adapted.tokens.unload()
    adapted.invocations.clear()
    if adapted.replication is not None:
        # Merged layers are no longer alike; without a merge the model's own layers come back.
        adapted.replication.settle() if merged else adapted.replication.undo(adapted)
    adapted.biases.settle()
    if unties:
        mark_untied(adapted.model)
    if into is not None:
        done = [path for path, layer in adapted.layers.items() if layer.merged_adapters and into == "dequantised"]
        mark_merged(adapted, done)
    for name, parameter in adapted.model.named_parameters():
        parameter.requires_grad_(name in adapted.index.trainable)
    return adapted.model


def untied_by(adapted: AdaptedModel, names: Sequence[str]) -> str | None:
    """A module whose weight is shared with another one now and would not be once ``names`` are merged.

    Raises:
        MergeError: there is one, in a model that cannot be saved so.
    """

    def alone(path: str, there: Mapping[str, object] | nn.ModuleDict) -> bool:
        return any(name in there and not keeps_tied(adapted, name, path) for name in names)

    changed = [path for path, layer in adapted.layers.items() if alone(path, layer.specs)]
    changed += [path for path, wrapper in adapted.saved.items() if alone(path, wrapper.modules_to_save)]
    unties = next((path for path in changed for t in adapted.index.tied if t == path or t.startswith(f"{path}.")), None)
    unties = unties or adapted.tokens.unties(names, adapted.index.tied)
    if unties and getattr(getattr(adapted.model, "config", None), "is_encoder_decoder", False):
        raise MergeError(
            f"{unties!r} shares its weight with another module, and {type(adapted.model).__name__} cannot be saved "
            "with the two different; use the adapter unmerged, or leave that module out of the adapter."
        )
    return unties


def _check(adapted: AdaptedModel, path: str, names: Sequence[str], safe: bool) -> None:
    layer = adapted.layers[path]
    with torch.no_grad():
        for name in names:
            check_place(layer, name)
            merged_bias(layer, [name], _bias(layer))
            if safe and not layer.changed(layer.original.weight(), [name]).isfinite().all():
                raise MergeError(f"Merging {name!r} into {path!r} gives values that are not finite.")


def check_place(layer: AdaptedLayer, name: str) -> None:
    """Check that an adapter's update has a place in the weight of a layer: on the meta device, where it costs nothing.

    Raises:
        MergeError: it has none.
    """
    layer.base.delta(*(torch.empty(shape, device="meta") for shape in layer.base.factor_shapes(layer.r[name])))


def _merge_layer(
    adapted: AdaptedModel, layer: AdaptedLayer, names: Sequence[str], reversible: bool, into: Into | None
) -> None:
    """Merge these adapters on top of those that are merged already, all from the original weight."""
    every = [*layer.merged_adapters, *names]
    original = layer.original
    if names and isinstance(original, QuantisedBase):
        assert into is not None
        with torch.no_grad():
            merge_quantised(adapted, layer, every, into, merged_bias(layer, every, original.bias()))
        if not reversible:
            layer.keep_stand_in()
        layer.merged_adapters = every
    elif names:
        module, leaves = layer.get_base_layer(), (layer.leaf, layer.base.bias_name())
        originals = layer.unmerged or {leaf: holder_of(module, leaf) for leaf in leaves if leaf is not None}
        with torch.no_grad():
            bias = _bias(layer)
            new_bias = merged_bias(layer, names, bias)
            layer.base.replace(layer.changed(layer.original.weight(), every))
            if new_bias is not None and new_bias is not bias:
                module._parameters[leaves[1]] = nn.Parameter(new_bias, requires_grad=False)  # type: ignore[index]
        layer.unmerged = originals if reversible else None
        layer.merged_adapters = every
    layer.refresh()


def _bias(layer: AdaptedLayer) -> Tensor | None:
    name = layer.base.bias_name()
    return None if name is None else layer.get_base_layer()._parameters[name]


def merged_bias(layer: AdaptedLayer, names: Sequence[str], bias: Tensor | None) -> Tensor | None:
    """The bias of a layer with those of some adapters merged into it; the given one when they have none."""
    for name in names:
        scaling = layer.scaling[name]
        bias = layer.variants[name].merged_bias(layer.original, layer.given(name), bias, scaling=scaling)
    return bias


def _restore(layer: AdaptedLayer) -> None:
    if layer.aside is not None:
        layer.give_back()
        layer.merged_adapters = []
    if layer.unmerged is not None:
        module = layer.get_base_layer()
        now = holder_of(module, layer.leaf)
        assert now is not None
        for leaf, original in layer.unmerged.items():
            if original is not None:
                # The model may have been moved or cast while merged.
                move(original, like=now)
            hold(module, leaf, original)
        layer.unmerged = None
        layer.merged_adapters = []
    layer.refresh()


def mark_untied(model: nn.Module) -> None:
    """Tell a Hugging Face model that its embeddings differ now: saved as tied, one of them would be lost."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    if getattr(model, "all_tied_weights_keys", None):
        model.all_tied_weights_keys = {}  # type: ignore[assignment]
