"""Tensors that all layers of an adapter share: how they go into its file, and what stands for them when they do not.

VeRA's random pair is in the file unless ``save_projection`` is off. Then it is drawn again from its seed, and a
checksum in the file tells whether this machine draws the same numbers.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.index import view
from veneer.adapters.targets import Selection
from veneer.core.errors import AdapterFileError

PREFIX = "base_model."
CHECKSUM = "shared_checksum"


def saved_shared(adapted: AdaptedModel, name: str) -> Iterator[tuple[str, str, Tensor]]:
    """(key in the file, key in memory, tensor) of the shared tensors that belong in an adapter's file."""
    layer = next(iter(adapted.layers_of(name).values()), None)
    for key, tensor in adapted.shared.of(name).items() if layer is not None else ():
        kept = layer.variants[name].in_file(key, tensor, "", adapted.peft_config[name])  # type: ignore[union-attr]
        if kept is not None:
            yield f"{PREFIX}{key}", f"{PREFIX}{key}.{name}", kept


def checksum_of(adapted: AdaptedModel, name: str) -> dict[str, str]:
    """What the file's metadata says about shared tensors that are not in the file: nothing when there are none."""
    layers = adapted.layers_of(name)
    saved = {key for key, _, _ in saved_shared(adapted, name)}
    if not adapted.shared.of(name) or saved:
        return {}
    variant = next(iter(layers.values())).variants[name]
    shapes = [layer.base.shape() for layer in layers.values()]
    return {CHECKSUM: _digest(variant.shared(shapes, adapted.peft_config[name]))}


def with_shared(
    selection: Selection, left: dict[str, Tensor], metadata: Mapping[str, str], problems: list[str], source: str
) -> Selection:
    """A selection with the shared tensors of a file, which are taken out of ``left``, or drawn again.

    Raises:
        AdapterFileError: they are not in the file, and this machine draws others from their seed.
    """
    shapes = [view(target.slot).shape() for target in selection.targets]
    drawn = selection.variant.shared(shapes, selection.config)
    if not drawn:
        return selection
    found: dict[str, Tensor] = {}
    for key, wanted in drawn.items():
        given = left.pop(f"{PREFIX}{key}", None)
        if given is not None and (
            given.ndim != 2 or any(g < w for g, w in zip(given.shape, wanted.shape, strict=True))
        ):
            problems.append(f"{PREFIX}{key} has shape {tuple(given.shape)}, expected at least {tuple(wanted.shape)}")
        elif given is not None:
            found[key] = given
        elif selection.variant.in_file(key, wanted, "", selection.config) is not None:
            problems.append(f"{PREFIX}{key} is missing")
    if not found and not problems:
        _check_drawn(drawn, metadata, source)
    return replace(selection, shared={**drawn, **found})


def placed(selection: Selection, tensors: Mapping[str, Tensor], dtype_of_adapter: torch.dtype) -> dict[str, Tensor]:
    """Shared tensors beside the first layer's weight, in the dtype of the adapter; where they are, beside one on meta.

    They are first rounded to the dtype of that weight, as in PEFT, whose files without them count on it.
    """
    if not tensors:
        return {}
    there, own = view(selection.targets[0].slot).placement()
    device = None if there.type == "meta" else there
    return {key: tensor.to(device=device, dtype=own).to(dtype_of_adapter) for key, tensor in tensors.items()}


def _check_drawn(drawn: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> None:
    if CHECKSUM not in metadata:
        warnings.warn(
            f"{source} does not hold its random projections, nor a checksum of them: they are drawn again from their "
            "seed, and whether they are those of its training cannot be told.",
            stacklevel=5,
        )
    elif metadata[CHECKSUM] != _digest(drawn):
        raise AdapterFileError(
            f"{source} does not hold its random projections, and this machine draws others from their seed "
            "than the one it was trained on; save it there again with save_projection=True."
        )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().float().cpu().contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
