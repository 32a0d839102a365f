"""A LoRA from a full fine-tune: the best low-rank approximation of what changed in each weight.

Both models are read from their files, one weight at a time. What changed and cannot be in a LoRA is named.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.checkpoint import Checkpoint, lent
from veneer.adapters.files import FINGERPRINT, PREFIX, AdapterFiles
from veneer.adapters.fingerprint import fingerprint
from veneer.adapters.index import view
from veneer.adapters.lowrank import Rank, check_rank, missed_by, spectrum_of
from veneer.adapters.plain import names_for, plain_config, stored
from veneer.adapters.target import Target
from veneer.adapters.targets import Selection, select
from veneer.core.base import merge_dtype
from veneer.core.config import LoraConfig
from veneer.core.errors import UsageError
from veneer.core.records import ApproximatedLayer


@dataclass(frozen=True)
class LeftOutTensor:
    """A tensor that differs between two models and is not in the adapter made of their difference."""

    name: str
    """The name of the parameter."""
    how: str
    """What became of it, in a few words."""
    relative: float | None
    """The norm of its change as a share of the base's norm; None where there is no such thing."""


@dataclass(frozen=True)
class Extraction:
    """A LoRA, and what it is not."""

    files: AdapterFiles
    """The adapter."""
    layers: tuple[ApproximatedLayer, ...]
    """Its layers, with the share of the change that each keeps."""
    unchanged: tuple[str, ...]
    """Layers that were looked at and did not change; they are not in the adapter."""
    left_out: tuple[LeftOutTensor, ...]
    """Tensors that changed and are not in the adapter."""


def extract(
    model: nn.Module,
    base: Checkpoint,
    tuned: Checkpoint,
    config: LoraConfig,
    rank: Rank,
    *,
    said: Callable[[int, int], None] = lambda done, of: None,
) -> Extraction:
    """Make a LoRA of the difference between two models.

    Args:
        model: the architecture of both, on the meta device.
        base: the weights to start from.
        tuned: the weights to arrive at.
        config: which layers to look at, and which modules to keep whole as they are in the tuned model.
        rank: the rank of every layer (its smaller side at most), or the share of each layer's energy to keep.
        said: called with the number of weights that are done, and of all.

    Raises:
        UsageError: nothing changed in these layers, or a weight has another shape in the two models.
        TargetError, ConfigError: see ``veneer.adapters.targets.select``.
    """
    check_rank(rank)
    adapted = AdaptedModel(model)
    selection = select(adapted.index, config)
    whole = {f"{slot.path}.{key}" for slot in selection.saved for key in slot.module.state_dict()}
    names = {f"{target.slot.path}.{target.slot.leaf}": target for target in selection.targets}
    rest = [name for name in dict.fromkeys([*base.names(), *tuned.names()]) if name not in names and name not in whole]
    layers: list[ApproximatedLayer] = []
    unchanged: list[str] = []
    left_out: list[LeftOutTensor] = []
    tensors: dict[str, Tensor] = {f"{PREFIX}{name}": tuned.read(name).clone() for name in sorted(whole)}
    for done, (name, target) in enumerate(names.items(), start=1):
        found = _layer(name, target, base, tuned, rank)
        if found is None:
            unchanged.append(target.slot.path)
        else:
            factors, record = found
            tensors |= {f"{PREFIX}{target.slot.path}.{key}": factor for key, factor in factors.items()}
            layers.append(record)
        said(done, len(names) + len(rest))
    for done, name in enumerate(rest, start=len(names) + 1):
        difference = _difference(name, base, tuned)
        if difference is not None:
            left_out.append(difference)
        said(done, len(names) + len(rest))
    if not layers:
        raise UsageError(
            f"Nothing changed in the {len(names)} layers that were looked at"
            + (f"; {len(left_out)} other tensors did, such as {left_out[0].name!r}." if left_out else ".")
        )
    mark = fingerprint(adapted, [slot.path for slot in selection.saved], read=base.read)
    files = AdapterFiles("", _config(adapted, selection, layers), dict(sorted(tensors.items())), {"format": "pt"})
    files.metadata[FINGERPRINT] = mark
    return Extraction(files, tuple(layers), tuple(unchanged), tuple(left_out))


def _config(adapted: AdaptedModel, selection: Selection, layers: list[ApproximatedLayer]) -> LoraConfig:
    ranks = {layer.path: layer.r for layer in layers}
    targets, excluded = names_for(adapted.index, ranks)
    return replace(
        plain_config(
            selection.config,
            ranks,
            target_modules=targets,
            exclude_modules=excluded,
            modules_to_save=selection.config.modules_to_save,
        ),
        inference_mode=True,
    )


def _layer(
    name: str, target: Target, base: Checkpoint, tuned: Checkpoint, rank: Rank
) -> tuple[dict[str, Tensor], ApproximatedLayer] | None:
    change = _change(name, base, tuned)
    if not change.any():
        return None
    with lent(target.slot.module, target.slot.leaf, change):
        view_of = view(target.slot)
        change_OI = view_of.weight().detach()
        spectrum = spectrum_of(change_OI, rank if isinstance(rank, int) else None)
        r = min(spectrum.rank_for(rank), *change_OI.shape)
        A, B = (factor.to(change.dtype) for factor in spectrum.factors(r))
        norm = math.sqrt(spectrum.energy)
        error = missed_by(change_OI, A, B) / norm
        record = ApproximatedLayer(target.slot.path, None, r, norm, spectrum.kept(r), error)
        return stored(view_of, A, B, None), record


def _change(name: str, base: Checkpoint, tuned: Checkpoint) -> Tensor:
    """What changed, as it is stored, in float32 or wider: float16 and bfloat16 weights differ exactly there."""
    if base.shape(name) != tuned.shape(name):
        raise UsageError(
            f"{name!r} has shape {base.shape(name)} in the base and {tuned.shape(name)} in the tuned model, so it has "
            "no difference; leave it out with --exclude-modules."
        )
    W, tuned_W = base.read(name), tuned.read(name)
    wide = merge_dtype(W, tuned_W)
    return tuned_W.to(wide) - W.to(wide)


def _difference(name: str, base: Checkpoint, tuned: Checkpoint) -> LeftOutTensor | None:
    """A tensor outside the looked-at layers, if it is not the same in both."""
    if name not in base or name not in tuned:
        return LeftOutTensor(name, "only in the tuned model" if name in tuned else "only in the base", None)
    if base.shape(name) != tuned.shape(name):
        return LeftOutTensor(name, f"shape {base.shape(name)} became {tuned.shape(name)}", None)
    change = _change(name, base, tuned)
    if not change.any():
        return None
    norm = float(base.read(name).to(change.dtype).norm())
    return LeftOutTensor(name, "changed", float(change.norm()) / norm if norm else math.inf)
