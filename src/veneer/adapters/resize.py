"""Give a saved LoRA another rank: the best approximation of its update, from its factors alone.

Each layer's ``B A`` is decomposed in the small space of its factors (see ``lowrank``), so that no (out, in) matrix is
made and no base model is needed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from veneer.adapters.derived import FileLayer, layers_in
from veneer.adapters.files import PREFIX, AdapterFiles
from veneer.adapters.layouts import check_pairs_in_file
from veneer.adapters.lowrank import Rank, check_rank, spectrum_of_product
from veneer.adapters.plain import plain_config
from veneer.core.config import LoraConfig
from veneer.core.lora_variant import BIAS
from veneer.core.records import ApproximatedLayer


def resize(files: AdapterFiles, rank: Rank) -> tuple[AdapterFiles, tuple[ApproximatedLayer, ...]]:
    """The same adapter at another rank, as plain LoRA with alpha equal to the rank.

    >>> smaller, report = resize(files.read("./adapter"), 4)

    Args:
        files: a plain LoRA.
        rank: the rank of every layer, or the share of each layer's energy to keep: the smallest rank that does.
            A layer of a lower rank is filled up with zeros, which changes nothing (and never learns).

    Returns:
        The adapter, whose tensors keep their dtype, and for each layer what it keeps. The error is that of the
        tensors as they are written, the rounding to their dtype included.

    Raises:
        UsageError: no rank, or no plain LoRA.
        AdapterFileError: a broken file.
    """
    check_rank(rank)
    config = files.config
    check_pairs_in_file(config.to_dict(), "resizing")
    layers, rest = layers_in(files)
    assert isinstance(config, LoraConfig)
    tensors: dict[str, Tensor] = dict(rest)
    report = []
    for path, layer in layers.items():
        named, record = _resized(path, layer, rank)
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in named.items()}
        report.append(record)
    new = plain_config(
        config,
        {record.path: record.r for record in report},
        modules_to_save=config.modules_to_save,
        bias=config.bias,
        lora_bias=config.lora_bias,
    )
    return replace(files, config=new, tensors=dict(sorted(tensors.items()))), tuple(report)


def _resized(path: str, layer: FileLayer, rank: Rank) -> tuple[dict[str, Tensor], ApproximatedLayer]:
    A, B = layer.product()
    spectrum = spectrum_of_product(A, B)
    r = spectrum.rank_for(rank)
    named = layer.stored(*spectrum.factors(r))
    norm = math.sqrt(spectrum.energy)
    new_A, new_B = (named[name].flatten(1).double() for name in layer.names)
    missed = spectrum_of_product(torch.cat([A, new_A]), torch.cat([B, -new_B], 1))
    error = math.sqrt(missed.energy) / norm if norm else 0.0
    if layer.bias is not None:
        named[BIAS] = (layer.bias.double() * layer.scaling).to(layer.bias.dtype)
    return named, ApproximatedLayer(path, layer.r, r, norm, spectrum.kept(r), error)
