"""Merge adapters into a checkpoint tensor by tensor: that one tensor and the adapters are all that memory holds.

The model is on the meta device: modules, shapes and dtypes without values. Each tensor of a file is lent to the module
that it belongs to and merged there by the code that merges a loaded model, so the result is the same bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.checkpoint import Shard, lent
from veneer.adapters.embeddings import same_values
from veneer.adapters.files import AdapterFiles, Fitted, fit, warn_of_other_base
from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.lifecycle import activate
from veneer.adapters.loading import place, warn_of_own
from veneer.adapters.merge import check_place, mark_untied, merged_bias, untied_by
from veneer.adapters.tensorfile import in_order, write_one_by_one
from veneer.core import registry
from veneer.core.config import LoraConfig, TunerConfig
from veneer.core.disk import write_text, write_whole
from veneer.core.errors import MergeError, NotStreamableError, UsageError, listed

INDEX_NAME = "model.safetensors.index.json"


@final
class StreamingMerge:
    """Adapters fitted to a model without values, ready to be merged into its files.

    >>> StreamingMerge(model, {"default": files.read("./adapter")}, shards).write(Path("./merged"))

    Args:
        model: the base model with all parameters on the meta device, in the dtypes to write.
        adapters: by name; several add up.
        shards: the base model's files.

    Raises:
        NotStreamableError: the merge needs values that are not all in one file; the message says which.
        AdapterFileError: an adapter does not fit the model.
        MergeError, UsageError: adapters that cannot be merged, or not together.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, AdapterFiles], shards: Sequence[Shard]) -> None:
        self.shards = [shard for shard in shards if shard.names]
        self.places = _places(model)
        self.tied = _tied(self.places)
        self.adapted = AdaptedModel(model)
        self.names = list(adapters)
        self.fitted: dict[str, Fitted] = {}
        for name, files in adapters.items():
            _refuse_start(name, files)
            self.fitted[name] = fit(self.adapted, files)
            place(self.adapted, name, self.fitted[name], trainable=False, autocast_adapter_dtype=True)
        activate(self.adapted, self.names, trainable=False)
        self.unties = untied_by(self.adapted, self.names) is not None
        self.layers: dict[tuple[nn.Module, str], AdaptedLayer] = {}
        for layer in self.adapted.layers.values():
            self.layers |= {
                (layer.get_base_layer(), leaf): layer for leaf in (layer.leaf, layer.base.bias_name()) if leaf
            }
        self.whole = {
            f"{path}.{key}": tensor
            for fitted in self.fitted.values()
            for path, keyed in fitted.whole.items()
            for key, tensor in keyed.items()
        }
        self._check_complete()
        for name, files in adapters.items():
            warn_of_other_base(self.adapted, files, self.fitted[name], read=self._read)

    def write(self, folder: Path) -> None:
        """Write the merged files and their index into a folder; the model's config then says whether it is untied.

        Raises:
            DiskError: a file could not be written.
            MergeError: a merged tensor has values that are not finite.
        """
        weight_map: dict[str, str] = {}
        for shard in self.shards:
            weight_map.update(dict.fromkeys(self._write(shard, folder / shard.path.name), shard.path.name))
        if len(self.shards) > 1:
            like = [self._like(name) for name in weight_map]
            totals = {
                "total_parameters": sum(tensor.numel() for tensor in like),
                "total_size": sum(tensor.numel() * tensor.element_size() for tensor in like),
            }
            text = json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2, sort_keys=True)
            write_text(folder / INDEX_NAME, text + "\n")
        if self.unties:
            mark_untied(self.adapted.model)

    def _read(self, name: str) -> Tensor:
        """A parameter of the base, as it is in its file."""
        names = self.tied.get(name, (name,))
        path, key = next((s.path, key) for s in self.shards for key, there in s.names.items() if there in names)
        return _tensor(path, key)

    def _write(self, shard: Shard, path: Path) -> list[str]:
        """Write one merged file; the names of its tensors."""
        homes: dict[str, str | None] = {}
        for key, name in shard.names.items():
            homes |= dict.fromkeys(self.tied.get(name, (name,)) if self.unties else (name,), key)
        if shard is self.shards[-1]:
            homes |= dict.fromkeys(self.added, None)
        like = {name: self._like(name) for name in homes}
        like = {name: like[name] for name in in_order(like)}
        with _opened(shard.path) as file:
            metadata = {"format": "pt", **(file.metadata() or {})}

        def write(beside: Path) -> None:
            with torch.no_grad():
                write_one_by_one(beside, like, self._merged(shard, [(name, homes[name]) for name in like]), metadata)

        write_whole(path.parent, {path.name: write})
        return list(like)

    def _merged(self, shard: Shard, wanted: Sequence[tuple[str, str | None]]) -> Iterator[tuple[str, Tensor]]:
        """The merged parameters with these names, each made from the tensor that has this key in the file, or none."""
        for key, several in groupby(wanted, key=lambda pair: pair[1]):
            W = torch.empty(0) if key is None else self._dressed(shard.names[key], _tensor(shard.path, key))
            for name, _ in several:
                yield name, self._final(name, W)
            del W

    def _like(self, name: str) -> Tensor:
        """A parameter of the model, without its values."""
        module, leaf = self.places[name]
        return _held(module)[leaf]

    def _dressed(self, name: str, W: Tensor) -> Tensor:
        """A tensor of the base as the adapters expect it: in the model's dtype, or the one that they bring along."""
        dtype = self._like(name).dtype
        W = W.to(dtype)
        for fitted in self.fitted.values():
            own = [key for key in fitted.embeddings if key in self.tied.get(name, (name,))]
            other = [key for key in own if not same_values(fitted.embeddings[key], W)]
            for key in other:
                warn_of_own(key)
                W = fitted.embeddings[key].to(dtype)
            W = fitted.biases[name].to(dtype) if name in fitted.biases else W
        return W

    def _final(self, name: str, W: Tensor) -> Tensor:
        """A parameter of the merged model, made from that of the base."""
        module, leaf = self.places[name]
        if name in self.whole:
            return self.whole[name].to(self._like(name).dtype)
        layer = self.layers.get((module, leaf))
        if layer is None:
            return self.adapted.tokens.written(module, leaf, W)
        here = [adapter for adapter in self.names if adapter in layer.specs]
        if leaf != layer.leaf:
            merged = merged_bias(layer, here, W)
            assert merged is not None
        else:
            merged = self._merged_weight(layer, here, W)
        if not merged.isfinite().all():
            raise MergeError(f"Merging {listed(here)} into {name!r} gives values that are not finite.")
        return merged

    def _merged_weight(self, layer: AdaptedLayer, names: Sequence[str], W: Tensor) -> Tensor:
        module = layer.get_base_layer()
        # A copy: a tensor that lies in the mapped file is not aligned, and sums over it may round otherwise.
        with lent(module, layer.leaf, W.clone()):
            layer.base.replace(layer.changed(layer.original.weight(), names))
            merged = module._parameters[layer.leaf]
            assert merged is not None
            return merged.detach()

    def _check_complete(self) -> None:
        """Every parameter must come from one place, or it would be missing from the merged model."""
        stored = {name for shard in self.shards for name in shard.names.values()}
        held = set(stored)
        for group in self.tied.values():
            there = sorted(stored.intersection(group))
            if len(there) > 1:
                raise NotStreamableError(f"the files hold {listed(there)}, which are one parameter of the model")
            if there:
                held.update(group)
        in_order({name: self._like(name) for name in self.places})
        missing = sorted(self.places.keys() - held - self.whole.keys())
        if missing:
            raise NotStreamableError(f"the files hold no {listed(missing, most=3)}")
        empty = sorted(path for path, layer in self.adapted.layers.items() if _without_values(layer, self.names))
        if empty:
            raise NotStreamableError(f"the adapter's tensors on {listed(empty, most=3)} are made from the base's")
        written = {(id(module), leaf) for module, leaf in self.places.values()}
        for path, layer in self.adapted.layers.items():
            if (id(layer.get_base_layer()), layer.leaf) not in written:
                raise NotStreamableError(f"the weight of {path!r} is computed from what the files hold")
            here = [name for name in self.names if name in layer.specs]
            for name in here:
                check_place(layer, name)
            leaf = layer.base.bias_name()
            if leaf is None or layer.get_base_layer()._parameters[leaf] is None:
                merged_bias(layer, here, None)
        self.added = [name for name in self.places if name in self.whole and name not in held]


def _refuse_start(name: str, files: AdapterFiles) -> None:
    assert isinstance(files.config, TunerConfig)
    if registry.load("inits", files.config.init).Init.moves:
        raise NotStreamableError(f"the adapter {name!r} stands on a weight that is made from the base's")
    if isinstance(files.config, LoraConfig) and files.config.layer_replication:
        raise NotStreamableError(f"the adapter {name!r} has layer_replication, and a deeper model than the files")


def _without_values(layer: AdaptedLayer, names: Sequence[str]) -> bool:
    return any(tensor.is_meta for name in names if name in layer.specs for tensor in layer.given(name).values())


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Everything in the model's state dict by name, tied parameters under each of their names."""
    return {
        f"{path}.{leaf}" if path else leaf: (module, leaf)
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf in _held(module)
    }


def _held(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and the buffers that are saved with it."""
    buffers = {leaf: b for leaf, b in module._buffers.items() if leaf not in module._non_persistent_buffers_set}
    return {leaf: tensor for leaf, tensor in {**module._parameters, **buffers}.items() if tensor is not None}


def _tied(places: Mapping[str, tuple[nn.Module, str]]) -> dict[str, tuple[str, ...]]:
    """From the name of a shared parameter to all its names, its own first."""
    groups: dict[int, list[str]] = {}
    for name, (module, leaf) in places.items():
        groups.setdefault(id(_held(module)[leaf]), []).append(name)
    return {
        name: (name, *(other for other in group if other != name))
        for group in groups.values()
        if len(group) > 1
        for name in group
    }


def _tensor(path: Path, key: str) -> Tensor:
    # Opened for each tensor: what stays open keeps all that was read of the file in memory.
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{str(path)!r} is not a complete safetensors file: {error}.") from None
