"""Saved adapters with updates that are not zero, and the dense updates to compare files with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from tests import models
from veneer import LoraConfig, PeftModel, get_peft_model

Q0 = "model.layers.0.self_attn.q_proj"


def adapted(kind: str = "llama", *, seed: int = 1, **config: Any) -> PeftModel:
    """A model with one adapter that changes its outputs."""
    full = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **config}
    model = get_peft_model(models.make(kind), LoraConfig(**full))
    models.randomise(model, seed=seed)
    return model


def saved(folder: Path, kind: str = "llama", *, seed: int = 1, **config: Any) -> Path:
    """The same in a folder."""
    adapted(kind, seed=seed, **config).save_pretrained(folder)
    return folder


def updates(model: PeftModel, name: str = "default") -> dict[str, Tensor]:
    """The (O, I) change of every layer, in float64."""
    with torch.no_grad():
        return {path: layer.change(name).double() for path, layer in model.base_model.layers_of(name).items()}


def updates_in(folder: Path, kind: str = "llama") -> dict[str, Tensor]:
    """The same of a saved adapter, loaded by veneer."""
    return updates(PeftModel.from_pretrained(models.make(kind), folder))


def peft_updates_in(folder: Path, kind: str = "llama") -> dict[str, Tensor]:
    """The same, loaded by PEFT."""
    model = peft.PeftModel.from_pretrained(models.make(kind), folder).base_model.model
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            W, delta = module.get_base_layer().weight, module.get_delta_weight("default").detach().double()
            stored_as_in_out = type(module.get_base_layer()).__name__ in ("Conv1D", "Embedding")
            assert delta.shape == W.shape
            found[path] = delta.T if stored_as_in_out else delta
    return found


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], *, relative: float = 2e-6) -> None:
    """Equal layers, and updates that are equal up to rounding."""
    assert found.keys() == wanted.keys()
    for path, update in wanted.items():
        torch.testing.assert_close(found[path], update, rtol=0, atol=relative * float(update.norm()), msg=path)


def best(update: Tensor, r: int) -> Tensor:
    """The closest matrix of rank r."""
    U, S, Vt = torch.linalg.svd(update, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vt[:r]


def config_of(folder: Path) -> dict[str, Any]:
    """The adapter's config as it stands in the file."""
    return json.loads((folder / "adapter_config.json").read_text())


def reconfigure(folder: Path, **fields: Any) -> None:
    """Change the config in the file."""
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **fields}))
