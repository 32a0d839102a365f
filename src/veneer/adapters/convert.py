"""Any adapter as plain LoRA of the original base: exactly where it can be, and with a measured error elsewhere.

- LoRA and rsLoRA keep their factors bit for bit; only alpha changes.
- A start that took a part of the weight (PiSSA, OLoRA, ...) is stacked with what it took off, at twice the rank.
- An update that is of low rank in another form (AdaLoRA, VeRA, ...) is decomposed into factors.
- An update that is of full rank (DoRA) becomes its best approximation at the rank asked for.

``convert_to_lora`` and ``save_as_lora`` have PEFT's names. The weights they make have alpha equal to the rank wherever
factors had to be made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.derived import write
from veneer.adapters.files import FINGERPRINT, PREFIX, AdapterFiles, adapter_state
from veneer.adapters.fingerprint import fingerprint
from veneer.adapters.index import PARAMETER
from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.layouts import check_attention, is_tied, joined, split, together
from veneer.adapters.lowrank import Rank, Spectrum, check_rank, missed_by, spectrum_of, spectrum_of_product
from veneer.adapters.plain import Factors, bias_of, factors_of, is_product, plain_config, stored
from veneer.adapters.ties import heads_in_file
from veneer.core.base import AbstractBase
from veneer.core.config import LoraConfig, TunerConfig
from veneer.core.errors import UsageError
from veneer.core.lora_variant import BIAS
from veneer.core.records import ApproximatedLayer

if TYPE_CHECKING:
    from veneer.adapters.model import PeftModel

_EXACT = 1e-6
"""Singular values below this share of the largest are rounding: those of a product in float32 lie near 1e-7."""


@dataclass(frozen=True)
class Converted:
    """An adapter as plain LoRA."""

    config: LoraConfig
    """Its config."""
    tensors: dict[str, Tensor]
    """Keyed as in its file."""
    layers: tuple[ApproximatedLayer, ...]
    """For each layer the rank before and after, and the error."""


@dataclass(frozen=True)
class _Made:
    """The factors of one layer, keyed as on disk."""

    factors: dict[str, Tensor]
    alpha: float
    record: ApproximatedLayer


def convert(
    adapted: AdaptedModel,
    name: str,
    rank: Rank | None = None,
    *,
    said: Callable[[int, int], None] = lambda done, of: None,
) -> Converted:
    """Write an adapter as plain LoRA.

    Args:
        adapted: the model with the adapter on it. Weights are read where an update depends on them.
        name: the adapter.
        rank: the rank of every layer, or the share of each layer's energy to keep. By default each layer has the
            rank that makes it exact.
        said: called with the number of layers that are done, and of all.

    Raises:
        UsageError: no such adapter, or without a rank an update that no low rank makes exact.
    """
    if rank is not None:
        check_rank(rank)
    adapted.require(name)
    check_attention(adapted, name)
    config = adapted.peft_config[name]
    assert isinstance(config, TunerConfig)
    layers = {path: layer for path, layer in adapted.layers_of(name).items() if not is_tied(layer, name)}
    names = adapted.names(name)
    tensors: dict[str, Tensor] = {}
    made: dict[str, _Made] = {}
    with torch.no_grad():
        for done, (path, layer) in enumerate(layers.items(), start=1):
            one = made[path] = _layer(path, layer, name, rank)
            named = {**one.factors, **_bias(layer, name, one)}
            place = f"{PREFIX}{names.wrapper(path)}"
            tensors |= {f"{place}.{key}": tensor.detach().clone() for key, tensor in named.items()}
            said(done, len(layers))
    new = plain_config(
        config,
        {path: one.record.r for path, one in made.items()},
        alphas={path: one.alpha for path, one in made.items()},
        modules_to_save=config.modules_to_save,
        bias="none" if config.bias == "none" else "all" if config.bias == "all" else "lora_only",
        lora_bias=any(key.endswith(".lora_B.bias") for key in tensors),
    )
    for key, source in heads_in_file(adapted, name, names).items():
        tensors[f"{PREFIX}{key}"] = tensors[f"{PREFIX}{source}"].t().clone(memory_format=torch.contiguous_format)
    tensors |= _rest(adapted, name)
    return Converted(new, dict(sorted(tensors.items())), tuple(one.record for one in made.values()))


def _layer(path: str, layer: AdaptedLayer, name: str, rank: Rank | None) -> _Made:
    base, r, scaling = layer.original, layer.r[name], layer.scaling[name]
    variant, own = layer.variants[name], layer.tensors(name)
    factors = factors_of(variant, base, own, scaling=scaling, r=r)
    if rank is None and is_product(variant) and own.keys() <= {*base.factor_names, BIAS}:
        # Also where factors are several pairs, as those of experts are: nothing has to be known of them.
        kept: dict[str, Tensor] = {key: own[key] for key in base.factor_names}
        norm = None if factors is None else _size(factors)
        return _Made(kept, scaling * r, ApproximatedLayer(path, r, r, norm))
    if rank is None and factors is not None:
        new_r = factors.A.shape[0]
        dtype = torch.promote_types(factors.A.dtype, factors.B.dtype)
        kept = stored(base, factors.A.to(dtype), factors.B.to(dtype), None)
        return _Made(kept, factors.scaling * new_r, ApproximatedLayer(path, r, new_r, _size(factors)))
    if layer.kind == PARAMETER:
        assert rank is not None
        return _experts(path, layer, name, rank)
    if factors is not None:
        A, B = factors.A.double() * factors.scaling, factors.B.double()
        whole = spectrum_of_product(A, B)
        return _approximated(path, r, base, whole, rank, factors.A.dtype, lambda a, b: _norm(A, B, a, b))
    change = layer.change(name)
    spectrum = spectrum_of(change, rank if isinstance(rank, int) else None)
    if rank is None:
        rank = _exact_rank(path, spectrum, r)
    return _approximated(path, None, base, spectrum, rank, change.dtype, lambda a, b: missed_by(change, a, b))


def _size(factors: Factors) -> float:
    return math.sqrt(spectrum_of_product(factors.A, factors.B).energy) * factors.scaling


def _approximated(
    path: str,
    r: int | None,
    base: AbstractBase,
    spectrum: Spectrum,
    rank: Rank | None,
    dtype: torch.dtype,
    missed: Callable[[Tensor, Tensor], float],
) -> _Made:
    assert rank is not None
    new_r = spectrum.rank_for(rank)
    A, B = (factor.to(dtype) for factor in spectrum.factors(new_r))
    norm = math.sqrt(spectrum.energy)
    error = missed(A, B) / norm if norm else 0.0
    record = ApproximatedLayer(path, r, new_r, norm, spectrum.kept(new_r), error)
    return _Made(stored(base, A, B, None), float(new_r), record)


def _experts(path: str, layer: AdaptedLayer, name: str, rank: Rank) -> _Made:
    """Every expert by itself, all at the rank that the one needs that needs the most."""
    base, r, own = layer.original, layer.r[name], layer.tensors(name)
    A, B = (own[key].double() for key in base.factor_names)
    pairs = split(A, B * layer.scaling[name], r)
    spectra = [spectrum_of_product(*pair) for pair in pairs]
    new_r = max(spectrum.rank_for(rank) for spectrum in spectra)
    made: list[tuple[Tensor, Tensor]] = []
    records = []
    for (A_RI, B_OR), spectrum in zip(pairs, spectra, strict=True):
        new_A, new_B = (factor.to(own[base.factor_names[0]].dtype) for factor in spectrum.factors(new_r))
        norm = math.sqrt(spectrum.energy)
        error = _norm(A_RI, B_OR, new_A, new_B) / norm if norm else 0.0
        made.append((new_A, new_B))
        records.append(ApproximatedLayer(path, r, new_r, norm, spectrum.kept(new_r), error))
    return _Made(dict(zip(base.factor_names, joined(made), strict=True)), float(new_r), together(path, records))


def _norm(A: Tensor, B: Tensor, new_A: Tensor, new_B: Tensor) -> float:
    """The norm of ``B A - new_B new_A``, in the small space of all four."""
    stacked = spectrum_of_product(torch.cat([A, new_A.double()]), torch.cat([B, -new_B.double()], 1))
    return math.sqrt(stacked.energy)


def _exact_rank(path: str, spectrum: Spectrum, r: int) -> int:
    """The number of singular values above rounding, if it is a low one."""
    values = spectrum.values
    count = max(1, int((values > _EXACT * values[0]).sum()))
    if count == len(values) and count > r:
        raise UsageError(
            f"The update of {path!r} has the full rank of {count}, so no plain LoRA is exactly it; say how closely it "
            "is to be met, with a rank (--r) or a share of the energy to keep (--energy)."
        )
    return count


def _bias(layer: AdaptedLayer, name: str, made: _Made) -> dict[str, Tensor]:
    """What the adapter adds to the layer's bias, divided by the factor that it is scaled by again."""
    found = bias_of(layer.tensors(name), layer.scaling[name])
    if found is None:
        return {}
    own, scaling = layer.tensors(name)[BIAS], made.alpha / made.record.r
    return {BIAS: own if scaling == layer.scaling[name] else (found / scaling).to(own.dtype)}


def _rest(adapted: AdaptedModel, name: str) -> dict[str, Tensor]:
    """What the adapter's file holds beside its layers: whole modules, biases, trained rows."""
    names = adapted.names(name)
    mine = {
        f"{PREFIX}{names.wrapper(path)}.{spec.file_key or key}"
        for path, layer in adapted.layers_of(name).items()
        for key, spec in layer.specs[name].items()
    } | {f"{PREFIX}{key}" for key in heads_in_file(adapted, name, names)}
    state = adapter_state(adapted, name)
    return {key: tensor for key, tensor in state.items() if key.startswith(PREFIX) and key not in mine}


def convert_to_lora(
    model: PeftModel,
    rank: Rank | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter of a model as plain LoRA (PEFT's function of this name).

    >>> config, tensors = convert_to_lora(model, rank=0.95)

    Args:
        model: the adapted model.
        rank: a rank, or the share of the energy to keep; PEFT needs one, here None is exact where that is possible.
        adapter_name: the adapter.
        progressbar: accepted as PEFT's option; it shows nothing.
        compile_kwargs: must stay None: nothing is compiled.

    Returns:
        The config, and the tensors keyed as in a file.

    Raises:
        UsageError: see ``convert``.
    """
    if compile_kwargs is not None:
        raise UsageError("compile_kwargs is given, but nothing is compiled here; leave it out.")
    found = convert(model.base_model, adapter_name, rank)
    return found.config, found.tensors


def save_as_lora(
    path: str | Path,
    model: PeftModel,
    rank: Rank | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write an adapter as plain LoRA into a folder (PEFT's function of this name); see ``convert_to_lora``.

    Raises:
        DiskError: the folder could not be written; what stood there before still stands.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    save(Path(path), model.base_model, adapter_name, config, tensors, figures={})


def save(
    folder: Path,
    adapted: AdaptedModel,
    name: str,
    config: LoraConfig,
    tensors: dict[str, Tensor],
    *,
    figures: dict[str, str],
    beside: Path | None = None,
) -> int:
    """Write a converted adapter; see ``veneer.adapters.derived.write``."""
    mark = fingerprint(adapted, list(adapted.saved_of(name)))
    ready = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    files = AdapterFiles("", config, ready, {"format": "pt", FINGERPRINT: mark})
    return write(folder, files, figures=figures, beside=beside)
