"""Combine adapters into a new one: weighted sums, stacking, and the methods that prune before they add.

The new adapter is plain LoRA with alpha equal to its rank. There are three families, with PEFT's names:

- On the updates: ``svd`` is the best approximation of ``sum(w_i * update_i)``; with a rank as large as the sum of the
  ranks it is exact. ``ties_svd``, ``dare_linear_svd``, ``dare_ties_svd`` and ``magnitude_prune_svd`` prune first.
- Stacked: ``cat`` is exactly ``sum(w_i * update_i)``, at the sum of the ranks.
- On the factors: ``linear``, ``ties``, ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` add up the As and the
  Bs, each scaled by ``sqrt(|w_i * scaling_i|)`` with the sign in A. That is cheap, and it is *not* the sum of the
  updates: ``(B_1 + B_2)(A_1 + A_2)`` has two products too many.

An adapter that is not on a layer counts there as an update of zero. Every expert is a layer of its own.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.arithmetic import MajoritySign, Recipe, quantile, recipe_for
from veneer.adapters.index import PARAMETER
from veneer.adapters.inject import check_name, inject
from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.layouts import check_ties, is_tied, joined, split, together
from veneer.adapters.lifecycle import remove
from veneer.adapters.lowrank import Spectrum, spectrum_of, spectrum_of_product
from veneer.adapters.merge import merged_names
from veneer.adapters.plain import Factors, bias_of, factors_of, invocation, names_for, plain_config, stored
from veneer.adapters.target import OUT_TIMES
from veneer.adapters.targets import select
from veneer.core.config import PeftConfig, TunerConfig
from veneer.core.errors import UsageError, listed
from veneer.core.lora_variant import BIAS
from veneer.core.records import ApproximatedLayer

_DRIVERS = ("gesvd", "gesvdj", "gesvda")
_ENOUGH = 0.99


@dataclass(frozen=True)
class _Part:
    """One adapter on one layer, with its weight."""

    name: str
    weight: float
    layer: AdaptedLayer
    factors: Factors | None


def add_weighted_adapter(
    adapted: AdaptedModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
) -> tuple[ApproximatedLayer, ...]:
    """Add an inactive adapter that combines others. After a failure the model is what it was.

    One adapter with weight 1, combined by linear, cat or svd, is copied: its saved file has the same content.
    A module that one of the adapters saves whole comes along as it is, and so do biases of the base.

    Args:
        adapted: the model.
        adapters: names of the adapters.
        weights: a weight each; it may be negative.
        adapter_name: the new adapter's name.
        combination_type: one of ``TYPES``, see this module.
        svd_rank: the rank of the new adapter; by default the largest of the adapters' on each layer, with a warning
            when that loses more than a hundredth of the energy.
        svd_clamp: clamp the values of the factors, above and below, at this quantile of theirs.
        svd_full_matrices: accepted as PEFT's option; it does not change the result.
        svd_driver: accepted as PEFT's option; the SVD is one of a small matrix.
        density: the share of the values that pruning keeps; needed by the methods that prune.
        majority_sign_method: how ties settles signs: by the sum of the values ("total") or their number ("frequency").

    Returns:
        For each layer the rank, and how much of what was asked for it keeps.

    Raises:
        UsageError: the combination has no meaning; the message says why.
    """
    _check_names(adapted, adapters, weights, adapter_name)
    if svd_driver is not None and svd_driver not in _DRIVERS:
        raise UsageError(f"svd_driver is {svd_driver!r}; expected one of {', '.join(_DRIVERS)}, or None.")
    if not isinstance(svd_full_matrices, bool):
        raise UsageError(f"svd_full_matrices is {svd_full_matrices!r}; expected true or false.")
    recipe = recipe_for(combination_type, svd_rank, svd_clamp, density, majority_sign_method, len(adapters))
    _check_whole(adapted, adapters)
    copies = recipe.exact and list(weights) == [1]
    check_ties(adapted, adapters)
    with torch.no_grad():
        if copies:
            report = _copy(adapted, adapters[0], adapter_name)
        else:
            report = _combined(adapted, adapters, weights, adapter_name, recipe)
        _bring_whole(adapted, adapters, adapter_name)
    return report


def _check_names(adapted: AdaptedModel, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    if isinstance(adapters, str) or not adapters:
        raise UsageError(f"adapters is {adapters!r}; expected a list of adapter names.")
    for adapter in adapters:
        adapted.require(adapter)
    twice = [adapter for adapter in dict.fromkeys(adapters) if list(adapters).count(adapter) > 1]
    if twice:
        raise UsageError(f"The same adapter is named twice: {listed(twice)}; add up its weights instead.")
    if len(weights) != len(adapters):
        raise UsageError(f"There are {len(adapters)} adapters and {len(weights)} weights; expected one weight each.")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UsageError(f"A weight is {weight!r}; expected a finite number.")
    check_name(name)
    if name in adapted.peft_config:
        raise UsageError(f"There is already an adapter {name!r}; delete it first, or choose another name.")
    if merged_names(adapted):
        raise UsageError(
            f"{listed(merged_names(adapted))} is merged into the weights; call unmerge_adapter() before combining."
        )


def _check_whole(adapted: AdaptedModel, adapters: Sequence[str]) -> None:
    for path, wrapper in adapted.saved.items():
        owners = [name for name in adapters if name in wrapper.modules_to_save]
        if len(owners) > 1:
            raise UsageError(
                f"Adapters {listed(owners)} each have their own {path!r}, saved whole, and these cannot be combined; "
                "leave all but one of them out."
            )
    rows = [name for name in adapters if adapted.tokens.of(name)]
    if rows:
        raise UsageError(
            f"Adapter {listed(rows)} trains rows of embeddings (trainable_token_indices), which cannot be combined; "
            "merge it into the model first, or leave it out."
        )
    if len({invocation(adapted.peft_config[name]) for name in adapters}) > 1:
        raise UsageError(
            f"Adapters {listed(adapters)} are active from different tokens on (alora_invocation_tokens), so no one "
            "adapter does what they do together."
        )
    biased = [name for name in adapters if name in adapted.biases.trained]
    if len(biased) > 1:
        raise UsageError(
            f"Adapters {listed(biased)} each train the base's biases (bias={_config(adapted, biased[0]).bias!r}), and "
            "these cannot be combined; leave all but one of them out."
        )


def _config(adapted: AdaptedModel, name: str) -> TunerConfig:
    config = adapted.peft_config[name]
    assert isinstance(config, TunerConfig)
    return config


def _copy(adapted: AdaptedModel, source: str, name: str) -> tuple[ApproximatedLayer, ...]:
    config: PeftConfig = copy.deepcopy(_config(adapted, source))
    layers = adapted.layers_of(source)
    _inject(adapted, name, config, {path: dict(layer.tensors(source)) for path, layer in layers.items()}, source)
    return tuple(ApproximatedLayer(path, layer.r[source], layer.r[source]) for path, layer in layers.items())


def _combined(
    adapted: AdaptedModel, adapters: Sequence[str], weights: Sequence[float], name: str, recipe: Recipe
) -> tuple[ApproximatedLayer, ...]:
    family = str(adapted.peft_config[adapters[0]].peft_type)
    if family != "LORA":
        raise UsageError(
            f"A combination is plain LoRA, which cannot stand beside adapters of type {family} on one model; convert "
            "each of them with save_as_lora, load these onto a model of their own, and combine them there."
        )
    found: dict[str, dict[str, Tensor]] = {}
    report: list[ApproximatedLayer] = []
    on = {name: adapted.layers_of(name) for name in adapters}
    # In the model's order, as in PEFT: what is drawn at random depends on it.
    biased = any(_has_bias(adapted, name) for name in adapters)
    for path in sorted({path for layers in on.values() for path in layers}, key=_place(adapted)):
        parts = [
            _Part(name, weight, on[name][path], _factors(on[name][path], name))
            for name, weight in zip(adapters, weights, strict=True)
            if path in on[name] and not is_tied(on[name][path], name)
        ]
        if parts:
            found[path], record = _on_layer(recipe, path, parts, biased, _is_inner(adapted, path))
            report.append(record)
    config = _new_config(adapted, adapters, {record.path: record.r for record in report})
    _inject(adapted, name, config, found, None)
    if recipe.rank is None:
        _warn_of_loss(recipe.kind, report)
    return tuple(report)


def _is_inner(adapted: AdaptedModel, path: str) -> bool:
    """Whether a layer is the output projection of an attention, which is no target of its own and goes with it."""
    return adapted.index.slot(path).kind is None


def _place(adapted: AdaptedModel) -> Callable[[str], tuple[int, str]]:
    """The place of a layer in the model; parameters of one module are in the order of their names."""
    order = adapted.index.order
    return lambda path: (order[adapted.index.slot(path).owner], path)


def _on_layer(
    recipe: Recipe, path: str, parts: list[_Part], biased: bool, inner: bool
) -> tuple[dict[str, Tensor], ApproximatedLayer]:
    """The new tensors of one layer, keyed as on disk; every expert is combined as a layer of its own."""
    base, times = parts[0].layer.original, OUT_TIMES if inner else 1
    if parts[0].layer.kind != PARAMETER:
        A, B, record = _layer(recipe, path, parts)
        return stored(base, A / times, B, _bias(recipe, parts, biased, B)), record
    made = [_layer(recipe, path, list(expert)) for expert in zip(*map(_experts, parts), strict=True)]
    factors = joined([(A, B) for A, B, _ in made])
    return dict(zip(base.factor_names, factors, strict=True)), together(path, [record for *_, record in made])


def _experts(part: _Part) -> list[_Part]:
    """An adapter on each of the matrices that a parameter holds."""
    tensors = part.layer.tensors(part.name)
    A, B = (tensors[name].detach() for name in part.layer.original.factor_names)
    scaling = part.layer.scaling[part.name]
    return [
        replace(part, factors=Factors(A_RI, B_OR, scaling, started=False))
        for A_RI, B_OR in split(A, B, part.layer.r[part.name])
    ]


def _warn_of_loss(kind: str, report: Sequence[ApproximatedLayer]) -> None:
    """A rank that nobody chose should not lose anything unsaid."""
    energy = sum((record.norm or 0.0) ** 2 for record in report)
    kept = sum((record.norm or 0.0) ** 2 * record.kept for record in report) / energy if energy else 1.0
    if kept < _ENOUGH:
        warnings.warn(
            f"At the rank of its adapters, {kind!r} keeps {kept:.1%} of the energy of what they are together; give a "
            "higher svd_rank, or combine them with cat.",
            stacklevel=4,
        )


def _factors(layer: AdaptedLayer, name: str) -> Factors | None:
    return factors_of(
        layer.variants[name], layer.original, layer.tensors(name), scaling=layer.scaling[name], r=layer.r[name]
    )


def _layer(recipe: Recipe, path: str, parts: list[_Part]) -> tuple[Tensor, Tensor, ApproximatedLayer]:
    """The new factors of one layer, in the dtype of the first adapter's."""
    factors = [part.factors for part in parts if part.factors is not None]
    whole = len(factors) == len(parts)
    dtype = next(iter(parts[0].layer.tensors(parts[0].name).values())).dtype
    default = max((part.factors.A.shape[0] if part.factors else part.layer.r[part.name]) for part in parts)
    if recipe.kind == "cat" or recipe.on_factors:
        if not whole:
            part = next(part for part in parts if part.factors is None)
            raise UsageError(
                f"The update of {part.name!r} on {path!r} is no product of two factors, so {recipe.kind!r} has no "
                "meaning for it; use combination_type='svd', which adds up the updates themselves."
            )
        A, B = _stacked(parts) if recipe.kind == "cat" else _added(recipe, path, parts)
        return A.to(dtype), B.to(dtype), ApproximatedLayer(path, default, A.shape[0])
    r = recipe.rank or default
    spectrum = _spectrum(recipe, parts, whole, r)
    A, B = spectrum.factors(r, balanced=False)
    if recipe.clamp is not None:
        bound = quantile(torch.cat([A.flatten(), B.flatten()]), recipe.clamp)
        A, B = A.clamp(-bound, bound), B.clamp(-bound, bound)
    record = ApproximatedLayer(path, default, r, math.sqrt(spectrum.energy), spectrum.kept(r), spectrum.error(r))
    return A.to(dtype), B.to(dtype), record


def _stacked(parts: list[_Part]) -> tuple[Tensor, Tensor]:
    pairs = [(part.factors, part.weight) for part in parts if part.factors is not None]
    return (
        torch.cat([f.A.to(torch.promote_types(f.A.dtype, torch.float32)) * (w * f.scaling) for f, w in pairs]),
        torch.cat([f.B for f, _ in pairs], 1),
    )


def _added(recipe: Recipe, path: str, parts: list[_Part]) -> tuple[Tensor, Tensor]:
    pairs = [(part, part.factors) for part in parts if part.factors is not None]
    if len({f.A.shape[0] for _, f in pairs}) > 1:
        ranks = ", ".join(f"{part.name} {f.A.shape[0]}" for part, f in pairs)
        raise UsageError(
            f"{recipe.kind!r} adds up factors, which needs equal ranks, and on {path!r} they are: {ranks}; "
            "use cat or a type with svd."
        )
    started = next((part.name for part, f in pairs if f.started), None)
    if started is not None:
        raise UsageError(
            f"{started!r} started from a part of the weight, which {recipe.kind!r} cannot take off again; "
            "use cat or a type with svd."
        )
    roots = [math.sqrt(abs(part.weight * f.scaling)) for part, f in pairs]
    signed = [math.copysign(root, part.weight * f.scaling) for root, (part, f) in zip(roots, pairs, strict=True)]
    wide = [(_wide(f.A), _wide(f.B)) for _, f in pairs]
    return recipe.combine([A for A, _ in wide], signed), recipe.combine([B for _, B in wide], roots)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _spectrum(recipe: Recipe, parts: list[_Part], whole: bool, r: int) -> Spectrum:
    """Of the combined update: in the small space of the stacked factors where nothing is pruned."""
    if recipe.kind == "svd" and whole and recipe.clamp is None:
        return spectrum_of_product(*_stacked(parts))
    total = recipe.combine([_update(part) for part in parts], [part.weight for part in parts])
    if recipe.clamp is None:
        return spectrum_of(total, r)
    # What is cut off depends on the signs of the singular vectors, which are free: those that LAPACK gives PEFT.
    U, S, Vt = torch.linalg.svd(total, full_matrices=False)
    return Spectrum(S, U, Vt)


def _update(part: _Part) -> Tensor:
    """The (O, I) update of one adapter, in float32 or wider."""
    if part.factors is None:
        return part.layer.change(part.name)
    return _wide(part.factors.B) @ _wide(part.factors.A) * part.factors.scaling


def _has_bias(adapted: AdaptedModel, name: str) -> bool:
    return any(BIAS in layer.specs[name] for layer in adapted.layers_of(name).values())


def _bias(recipe: Recipe, parts: list[_Part], wanted: bool, like: Tensor) -> Tensor | None:
    """The biases beside B, combined in the way of the factors; zeros where no adapter has one here."""
    if not wanted:
        return None
    none = torch.zeros(parts[0].layer.original.shape()[0], device=like.device)
    found = [bias_of(part.layer.tensors(part.name), part.layer.scaling[part.name]) for part in parts]
    return recipe.combine([none if bias is None else bias for bias in found], [part.weight for part in parts]).to(like)


def _new_config(adapted: AdaptedModel, adapters: Sequence[str], ranks: dict[str, int]) -> PeftConfig:
    ranks = {path: r for path, r in ranks.items() if not _is_inner(adapted, path)}
    parameters = [path for path in ranks if path not in adapted.index.slots]
    targets, excluded = names_for(adapted.index, ranks.keys() - set(parameters))
    biased = next((name for name in adapters if name in adapted.biases.trained), None)
    whole = [path for path, w in adapted.saved.items() if any(name in w.modules_to_save for name in adapters)]
    bias: Literal["none", "all", "lora_only"] = "none"
    if biased is not None:
        bias = "all" if _config(adapted, biased).bias == "all" else "lora_only"
    return plain_config(
        _config(adapted, adapters[0]),
        ranks,
        target_modules=targets,
        exclude_modules=excluded,
        target_parameters=parameters or None,
        modules_to_save=whole or None,
        bias=bias,
        lora_bias=any(_has_bias(adapted, name) for name in adapters),
    )


def _inject(
    adapted: AdaptedModel,
    name: str,
    config: PeftConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    source: str | None,
) -> None:
    with warnings.catch_warnings():
        # What there is to say about these targets was said when the adapters were made.
        warnings.simplefilter("ignore")
        selection = select(adapted.index, config, from_file=True)
    shared = {} if source is None else {key: t.clone() for key, t in adapted.shared.of(source).items()}
    inject(adapted, name, config, selection=selection, tensors=tensors, shared=shared, autocast_adapter_dtype=False)


def _bring_whole(adapted: AdaptedModel, adapters: Sequence[str], name: str) -> None:
    """The modules saved whole and the biases of the adapter that has them."""
    try:
        for wrapper in adapted.saved_of(name).values():
            owner = next(other for other in adapters if other in wrapper.modules_to_save)
            wrapper.modules_to_save[name].load_state_dict(wrapper.modules_to_save[owner].state_dict())
        for other in adapters:
            if other in adapted.biases.trained:
                values, mine = adapted.biases.values(other), adapted.biases.trained[name]
                mine.update({key: values[key].detach().clone() for key in mine if key in values})
    except BaseException:
        remove(adapted, name)
        raise
