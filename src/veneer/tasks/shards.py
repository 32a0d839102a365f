"""The weight files of a pretrained model one by one, for work that must not hold the whole model in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from veneer.adapters.checkpoint import Shard
from veneer.adapters.streaming import INDEX_NAME
from veneer.core.errors import NotStreamableError, UsageError, listed
from veneer.core.peft_config import read_json
from veneer.tasks.loading import load_config, load_model, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINGLE_NAME = "model.safetensors"


def skeleton(name_or_path: str | Path, *, auto_class: str, dtype: str = "auto", **options: Any) -> PreTrainedModel:
    """A pretrained model on the meta device, checked against its weight files as if it had been loaded.

    Every parameter has the dtype that it would be loaded in; parameters that are tied are one.

    Args:
        name_or_path: as for ``load_model``.
        auto_class: the transformers auto class that gives the task its head.
        dtype: as for ``load_model``.
        options: as for ``load_model``.

    Raises:
        UsageError: see ``load_model``.
        NotStreamableError: a quantised checkpoint, or one without safetensors files.
    """
    config = load_config(name_or_path)
    if getattr(config, "quantization_config", None) is not None:
        raise NotStreamableError("the weights are quantised")
    if getattr(config, "transformers_weights", None) is not None:
        raise NotStreamableError("the config names weight files of its own")
    model = load_model(name_or_path, auto_class=auto_class, dtype=dtype, device_map="meta", **options)
    if model._weight_conversions:
        raise NotStreamableError(f"transformers converts the tensors of a {type(model).__name__} when it loads one")
    return model


def weight_files(name_or_path: str | Path) -> list[Path]:
    """The safetensors files of a pretrained model, in the order of their names.

    Raises:
        UsageError: no such model, or an index that names files that are not there.
        NotStreamableError: its weights are in another format.
    """
    folder = model_folder(name_or_path)
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        raise NotStreamableError(f"the model has neither {SINGLE_NAME} nor {INDEX_NAME}")
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UsageError(f"{str(index)!r} names the file {name!r}, which is not in that folder.")
    return [folder / name for name in names]


def shards(model: PreTrainedModel, files: Sequence[Path]) -> list[Shard]:
    """Weight files with the parameter that each of their tensors is.

    Keys that the model has no place for are left out, as they are when it is loaded. A checkpoint of the model's
    body fits a model with a head, and the other way round: the prefix of the body is added or taken off.

    Raises:
        NotStreamableError: a parameter is there twice, or may be.
    """
    places = frozenset(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    found: list[Shard] = []
    taken: set[str] = set()
    for path in files:
        with safetensors.safe_open(path, framework="pt") as file:
            keys = file.keys()
        named = {key: name for key in keys if (name := _place(key, prefix, places)) is not None}
        twice = [
            name for name, count in Counter([*named.values(), *(taken & set(named.values()))]).items() if count > 1
        ]
        if twice:
            raise NotStreamableError(f"the files hold {listed(twice, most=3)} twice")
        taken.update(named.values())
        found.append(Shard(path, named))
    for name, other in model.all_tied_weights_keys.items():
        if {name, other} <= taken:
            # Whether the two are one parameter depends on their values.
            raise NotStreamableError(f"the files hold both {name} and {other}, which the model may share")
    return found


def save_configs(model: PreTrainedModel, folder: Path) -> None:
    """Write what transformers' ``save_pretrained`` writes beside the weights: the config, and that of generation."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _place(key: str, prefix: str, places: frozenset[str]) -> str | None:
    """The parameter that a tensor of a file belongs to, or None."""
    forms = {key, f"{prefix}{key}", key.removeprefix(prefix)} if prefix != "." else {key}
    found = sorted(forms & places)
    if len(found) > 1:
        raise NotStreamableError(f"{key!r} may be {' or '.join(map(repr, found))}")
    return found[0] if found else None
