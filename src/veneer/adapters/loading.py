"""Bring an adapter that was read from disk into a model: all of it, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.files import AdapterFiles, Fitted, fit, warn_of_other_base
from veneer.adapters.inject import inject
from veneer.adapters.replication import replicated
from veneer.core.errors import UsageError
from veneer.core.records import MatchReport
from veneer.core.variant import ParameterSpec


def load_into(
    adapted: AdaptedModel, name: str, files: AdapterFiles, *, trainable: bool, autocast_adapter_dtype: bool
) -> MatchReport:
    """Add an adapter from its files.

    A name that is taken is refused, with two exceptions that only fill what is there, when the config is the same:
    an adapter whose tensors were left on the meta device, and the checkpoint of transformers' Trainer (told by its
    ``trainer_state.json``), which resumes and goes back to its best step through this very call, while its optimiser
    holds on to the parameters.

    Args:
        adapted: the model.
        name: the adapter's name.
        files: what ``files.read`` gave.
        trainable: recorded in its config as ``inference_mode``.
        autocast_adapter_dtype: see ``inject``.

    Returns:
        What the adapter is on.

    Raises:
        AdapterFileError: the files do not fit the model; nothing has changed.
        UsageError: the name is taken; what may be filled has another config or is merged.
    """
    if name in adapted.peft_config and not (_from_trainer(files.source) or _is_unfilled(adapted, name)):
        raise UsageError(
            f"There is already an adapter {name!r}; delete it first, load under another name, or put the new weights "
            "in its place with hotswap_adapter."
        )
    with replicated(adapted, files.config):
        fitted = fit(adapted, files)
        warn_of_other_base(adapted, files, fitted)
        for key in fitted.embeddings:
            if not adapted.original(key).is_meta:
                warn_of_own(key)
        return place(adapted, name, fitted, trainable=trainable, autocast_adapter_dtype=autocast_adapter_dtype)


def place(
    adapted: AdaptedModel, name: str, fitted: Fitted, *, trainable: bool, autocast_adapter_dtype: bool
) -> MatchReport:
    """Add an adapter whose tensors are sorted to the model already; see ``load_into``."""
    exists = name in adapted.peft_config
    if exists:
        _check_same(adapted, name, fitted)
        for layer in adapted.layers_of(name).values():
            layer.materialise(name)
        adapted.tokens.materialise(name)
    else:
        config = replace(fitted.selection.config, inference_mode=not trainable)
        inject(
            adapted,
            name,
            config,
            selection=replace(fitted.selection, config=config),
            tensors=fitted.factors,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
    with torch.no_grad():
        for now, loaded in _pairs(adapted, name, fitted, factors=exists):
            now.copy_(loaded)
    return adapted.reports[name]


def _from_trainer(source: str) -> bool:
    """Whether weights lie in a checkpoint of transformers' Trainer, or in an adapter's own folder in one."""
    folder = Path(source).parent
    return any((place / "trainer_state.json").is_file() for place in (folder, folder.parent))


def _is_unfilled(adapted: AdaptedModel, name: str) -> bool:
    """Whether an adapter was left without values beside a base that has some."""
    return any(
        tensor.is_meta and layer.base.placement()[0].type != "meta"
        for layer in adapted.layers_of(name).values()
        for tensor in layer.tensors(name).values()
    )


def warn_of_own(key: str) -> None:
    """Say that an adapter's file holds an embedding that takes the place of the base's."""
    warnings.warn(
        f"The adapter brings its own {key}, which differs from the base model's; it replaces it.", stacklevel=5
    )


def _pairs(adapted: AdaptedModel, name: str, fitted: Fitted, *, factors: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(tensor in the model, loaded tensor) for everything that is written in place."""
    if factors:
        for path, keyed in fitted.factors.items():
            tensors = adapted.layers[path].tensors(name)
            yield from ((tensors[key], loaded) for key, loaded in keyed.items())
        yield from ((now, (fitted.selection.shared or {})[key]) for key, now in adapted.shared.of(name).items())
        rows = adapted.tokens.of(name)
        yield from ((rows[e.slot.path], e.values) for e in fitted.selection.tokens if e.values is not None)
    for path, keyed in fitted.whole.items():
        state = adapted.saved[path].modules_to_save[name].state_dict()
        yield from ((state[key], loaded) for key, loaded in keyed.items())
    if fitted.biases:
        values = adapted.biases.values(name)
        yield from ((values[key], loaded) for key, loaded in fitted.biases.items())
    for key, loaded in fitted.embeddings.items():
        yield adapted.original(key), loaded


def _saved(specs: Mapping[str, ParameterSpec]) -> tuple[str, ...]:
    return tuple(key for key, spec in specs.items() if spec.saved)


def _check_same(adapted: AdaptedModel, name: str, fitted: Fitted) -> None:
    if any(name in layer.merged_adapters for layer in adapted.layers.values()):
        raise UsageError(f"{name!r} is merged into the weights; call unmerge_adapter() before loading onto it.")
    have = {
        path: (layer.r[name], layer.scaling[name], _saved(layer.specs[name]))
        for path, layer in adapted.layers_of(name).items()
    }
    new = {t.slot.path: (t.r, t.scaling, _saved(t.specs)) for t in fitted.selection.targets}
    same_rest = set(fitted.whole) == set(adapted.saved_of(name)) and set(fitted.biases) == set(
        adapted.biases.trained.get(name, ())
    )
    rows = {each.slot.path: each.indices for each in fitted.selection.tokens}
    same_rest &= rows == {path: each.indices for path, each in adapted.tokens.rows.get(name, {}).items()}
    if have != new or not same_rest:
        changed = next((path for path in {**have, **new} if have.get(path) != new.get(path)), "the modules saved whole")
        raise UsageError(
            f"There is already an adapter {name!r}, with another config (it differs at {changed}); "
            "delete it first, or load under another name."
        )
