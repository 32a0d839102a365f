"""LoftQ on a base that is quantised already: factors that make up for what quantising took from each weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import final

import safetensors
import torch
from torch import Tensor, nn

from veneer.adapters.evidence import adapted_of
from veneer.core.errors import ConfigError, UsageError
from veneer.core.hub import locate
from veneer.inits.loftq import halves

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Let an adapter on a quantised model start at the best correction of the quantisation error, layer by layer.

    >>> model = get_peft_model(load_in_4_bits(folder), LoraConfig(target_modules="all-linear"))
    >>> replace_lora_weights_loftq(model, folder)

    The weights that were quantised are read from safetensors files one at a time. ``s B A`` becomes the best
    approximation of what is missing, s included; PEFT leaves s out, which fits for ``lora_alpha == r`` only.

    Args:
        peft_model: a PeftModel on a quantised base.
        model_path: the folder or file with the full-precision weights; without it, where the base came from.
        adapter_name: the adapter.
        callback: called with the model and the layer's name after each layer; when it returns False, that layer gets
            its factors back. Calling this function again may then improve further layers.

    Raises:
        UsageError: no PeftModel, no quantised layer under the adapter, or no such weights.
        ConfigError: a layer whose rank is larger than its weight.
    """
    adapted = adapted_of(peft_model)
    if adapted is None:
        raise UsageError("replace_lora_weights_loftq needs a PeftModel; call get_peft_model(model, config) first.")
    adapted.require(adapter_name)
    layers = {path: layer for path, layer in adapted.layers_of(adapter_name).items() if not layer.original.exact}
    if not layers:
        raise UsageError(
            f"No layer of {adapter_name!r} is quantised; for a model in full precision use init_lora_weights='loftq'."
        )
    if any(layer.merged_adapters for layer in layers.values()):
        raise UsageError("An adapter is merged into the weights; call unmerge_adapter() first.")
    weights = _Weights(adapted.model, model_path)
    for path, layer in layers.items():
        base, tensors = layer.original, layer.tensors(adapter_name)
        A, B = (tensors[name] for name in base.factor_names)
        W_OI = weights.read(f"{path}.{layer.leaf}").to(A.device, torch.float32)
        if W_OI.shape != base.shape():
            raise UsageError(f"{path!r} is {tuple(base.shape())} in the model and {tuple(W_OI.shape)} in its files.")
        if A.shape[0] > min(W_OI.shape):
            raise ConfigError(f"LoftQ with rank {A.shape[0]} has no meaning on {path!r}, which is {tuple(W_OI.shape)}.")
        before = A.clone(), B.clone()
        A_RI, B_OR = halves(W_OI - base.weight().to(torch.float32), A.shape[0])
        root = layer.scaling[adapter_name] ** 0.5
        A.copy_(A_RI / root)
        B.copy_(B_OR / root)
        if callback is not None and not callback(peft_model, path):
            A.copy_(before[0])
            B.copy_(before[1])


@final
class _Weights:
    """The tensors of a model's safetensors files, read by parameter name."""

    def __init__(self, model: nn.Module, path: str | Path | None) -> None:
        config = getattr(model, "config", None)
        source = path if path is not None else getattr(config, "_name_or_path", None)
        if not source:
            raise UsageError("This model does not say where its weights are; pass model_path, a folder or a file.")
        self.prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
        self.files: dict[str, Path] = {}
        for file in _files(source):
            try:
                with safetensors.safe_open(file, framework="pt") as opened:
                    self.files |= dict.fromkeys(opened.keys(), file)
            except (safetensors.SafetensorError, OSError) as error:
                raise UsageError(f"{str(file)!r} is not a complete safetensors file: {error}.") from None
        self.source = source

    def read(self, name: str) -> Tensor:
        """A parameter, also from the file of the body alone, which leaves its prefix out.

        Raises:
            UsageError: it is not there.
        """
        for key in (name, name.removeprefix(self.prefix), f"{self.prefix}{name}"):
            if key in self.files:
                with safetensors.safe_open(self.files[key], framework="pt") as opened:
                    found: Tensor = opened.get_tensor(key)
                    return found
        raise UsageError(f"{str(self.source)!r} holds no {name!r}; expected the weights that were quantised.")


def _files(source: str | Path) -> list[Path]:
    place = Path(source).expanduser()
    if place.is_file():
        return [place]
    try:
        return [locate(source, _WEIGHTS)]
    except UsageError:
        index = locate(source, _INDEX)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UsageError(f"{str(index)!r} is no index of weight files.") from None
    if any(Path(name).name != name for name in names):
        raise UsageError(f"{str(index)!r} names files outside of its folder.")
    return [locate(source, name) for name in names]
