"""The updates of an adapter, layer by layer: from its file alone, or on the model that it adapts.

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.files import PREFIX, AdapterFiles
from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.lowrank import Spectrum, spectrum_of, spectrum_of_product
from veneer.adapters.plain import numbers
from veneer.adapters.rebase import initial_name
from veneer.core import registry
from veneer.core.config import LoraConfig, TunerConfig
from veneer.core.errors import UsageError, listed
from veneer.core.lora_variant import BIAS
from veneer.core.variant import AbstractVariant, variant_of

_FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"), ("lora_A", "lora_B"))
"""The names that factors are stored under: of linear layers and convolutions, of embeddings, of AdaLoRA."""
_BESIDE = {BIAS, "lora_E", "ranknum"}
"""What may stand beside two factors whose product is the update of the weight."""
_PRODUCTS = {"lora", "alora", "adalora"}
"""Variants (the files in ``variants/``) whose update is the product of the factors in their file."""
_IN_PART = {"dora"}
"""Variants whose update has such a product in it, and depends on the frozen weight too."""


@dataclass(frozen=True)
class LayerUpdate:
    """The change of the weight of one layer, held as the factors that it is the product of, where there are such."""

    path: str
    """The layer's path in the base model."""
    shape: tuple[int, int]
    """(O, I)."""
    r: int
    """The rank that the adapter has here."""
    scaling: float
    """The factor of the update, which is in ``spectrum`` already."""
    norms: tuple[float, float] | None
    """The Frobenius norms of A and B; None for a variant that has no such factors."""
    spectrum: Callable[[], Spectrum]
    """Decomposes the update."""
    whole: bool
    """Whether the spectrum is that of the update itself, or only of what the factors add to it."""
    weight_norm: float | None
    """The Frobenius norm of the frozen weight, where it is known."""


def updates_in_file(files: AdapterFiles) -> list[LayerUpdate]:
    """The updates in an adapter's file, in the order of their layers. No model is needed, and none is built.

    The update of DoRA, and of a start that moves the frozen weight, depends on that weight: what is told then is the
    part ``scaling * B A``, with ``whole`` False.

    Raises:
        UsageError: the file does not tell its updates, as those of some variants and of adapted parameters;
            ``updates_on_model`` does.
    """
    config = files.config
    assert isinstance(config, TunerConfig)
    layers: dict[str, dict[str, Tensor]] = {}
    for key in files.tensors:
        for name in (name for pair in _FACTORS for name in pair):
            if key.endswith(f".{name}"):
                layers.setdefault(key.removeprefix(PREFIX).removesuffix(f".{name}"), {})
    if not layers or _kind(variant_of(config)) not in _PRODUCTS | _IN_PART:
        raise UsageError(
            f"{files.source} holds an adapter of type {config.peft_type}, whose updates are no products of two "
            "factors in the file; name the base model (--model), on which every update can be told."
        )
    if isinstance(config, LoraConfig) and config.target_parameters:
        raise UsageError(
            f"{files.source} adapts parameters ({listed(config.target_parameters)}), which its tensors are not named "
            "after; name the base model (--model), on which every update can be told."
        )
    for key, tensor in files.tensors.items():
        path = max((p for p in layers if key.startswith(f"{PREFIX}{p}.")), key=len, default=None)
        if path is not None:
            layers[path][key.removeprefix(f"{PREFIX}{path}.")] = tensor
    # A wrapper inside a wrapped module has a longer name than its module.
    names = {path: path.replace(".base_layer", "") for path in layers}
    if len(set(names.values())) < len(names):
        names = {path: path for path in layers}
    return [
        # The output projection of an attention counts twice; see ``target``.
        _from_file(names[path], layers[path], config, times=2 if path.endswith(".base_layer.out_proj") else 1)
        for path in sorted(layers, key=_natural)
    ]


def _kind(variant: AbstractVariant) -> str:
    return type(variant).__module__.rpartition(".")[2]


def _from_file(path: str, tensors: dict[str, Tensor], config: TunerConfig, *, times: int) -> LayerUpdate:
    variant, (r, alpha) = variant_of(config), numbers(config, path)
    scaling = variant.scaling(r, alpha, config) * times
    found = _factored(tensors, r, scaling)
    if found is None:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items()))
        raise UsageError(
            f"The tensors of {path!r} ({shapes}) are no two factors of rank {r}; name the base model (--model), on "
            "which every update can be told."
        )
    start = registry.load("inits", config.init).Init
    whole = found.whole and (found.started or not (start.moves or start.subtracts)) and _kind(variant) in _PRODUCTS
    spectrum = partial(spectrum_of_product, found.A_RI, found.B_OR)
    return LayerUpdate(path, found.shape, r, scaling, found.norms, spectrum, whole, None)


class _Factored(NamedTuple):
    """Two factors whose product is an update, scaling included."""

    A_RI: Tensor
    B_OR: Tensor
    norms: tuple[float, float]
    """Of the two as stored."""
    whole: bool
    """Whether nothing else is part of the update."""
    started: bool
    """Whether factors that it started with are taken off."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.B_OR.shape[0], self.A_RI.shape[1]


def _factored(tensors: Mapping[str, Tensor], r: int, scaling: float) -> _Factored | None:
    names = next((pair for pair in _FACTORS if pair[0] in tensors and pair[1] in tensors), None)
    if names is None or any(tensors[name].ndim < 2 or not tensors[name].numel() for name in names):
        return None
    A, B = (tensors[name].detach().double().flatten(1) for name in names)
    norms, B = (float(A.norm()), float(B.norm())), _full(B, A.shape[0])
    if A.shape[0] != r or B.shape[1] != r:
        return None
    if "lora_E" in tensors:
        A = A * tensors["lora_E"].detach().double().reshape(-1, 1)
    A0, B0 = (initial_name(name) for name in names)
    whole, started = tensors.keys() <= {*names, *_BESIDE, A0, B0}, A0 in tensors and B0 in tensors
    B = B * scaling
    if started:
        A = torch.cat([A, tensors[A0].detach().double().flatten(1)])
        B = torch.cat([B, -tensors[B0].detach().double().flatten(1)], 1)
    return _Factored(A, B, norms, whole, started)


def _full(B: Tensor, r: int) -> Tensor:
    """B of a convolution in groups, where each group of outputs sees its own part of the rank, as one matrix."""
    groups = r // B.shape[1] if B.shape[1] and r % B.shape[1] == 0 else 1
    if groups == 1 or B.shape[0] % groups:
        return B
    full: Tensor = torch.block_diag(*B.chunk(groups))  # type: ignore[no-untyped-call]
    return full


def updates_on_model(adapted: AdaptedModel, name: str) -> Iterator[LayerUpdate]:
    """The updates of an adapter on its model, in the model's order; of any variant.

    An update that is a product of factors is decomposed by them, any other one as a dense matrix, one at a time.

    Raises:
        UsageError: there is no adapter of that name.
        MergeError: an update that cannot be told apart from the layer that computes it.
    """
    adapted.require(name)
    for path, layer in adapted.layers_of(name).items():
        yield _on_model(path, layer, name)


def _on_model(path: str, layer: AdaptedLayer, name: str) -> LayerUpdate:
    base, tensors, r, scaling = layer.original, layer.given(name), layer.r[name], layer.scaling[name]
    found = _shared_pair(tensors, base.shape()) or _factored(tensors, r, scaling)
    norms = None if found is None else found.norms
    weight_norm = float(base.weight().detach().double().norm())
    if found is None or not found.whole or _kind(layer.variants[name]) not in {*_PRODUCTS, "vera"}:
        return LayerUpdate(path, base.shape(), r, scaling, norms, partial(_dense, layer, name), True, weight_norm)
    spectrum = partial(spectrum_of_product, found.A_RI, found.B_OR)
    return LayerUpdate(path, found.shape, r, scaling, norms, spectrum, True, weight_norm)


def _shared_pair(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> _Factored | None:
    """VeRA's factors on one layer: its part of the pair that all layers share, scaled by its own two vectors."""
    if "vera_A" not in tensors:
        return None
    outputs, inputs = shape
    names = ("vera_lambda_d", "vera_lambda_b", "vera_A", "vera_B")
    d_R, b_O, A, B = (tensors[name].detach().double() for name in names)
    A_RI, B_OR = d_R.unsqueeze(1) * A[:, :inputs], b_O.unsqueeze(1) * B[:outputs]
    return _Factored(A_RI, B_OR, (float(A_RI.norm()), float(B_OR.norm())), whole=True, started=False)


def _dense(layer: AdaptedLayer, name: str) -> Spectrum:
    with torch.no_grad():
        return spectrum_of(layer.change(name))


def _natural(path: str) -> list[str]:
    return [part.zfill(6) if part.isdigit() else part for part in path.split(".")]
