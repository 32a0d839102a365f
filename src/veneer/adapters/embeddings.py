"""Whole embedding tables beside an adapter: those of a resized vocabulary, and those that PEFT's files bring along."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from veneer.adapters.adapted import AdaptedModel
from veneer.core.config import PeftConfig, read_json
from veneer.core.errors import listed


def _embedding_paths(adapted: AdaptedModel) -> list[str]:
    paths = dict.fromkeys((adapted.index.input_path, adapted.index.output_path))
    # A vision model calls the module that cuts its image into patches an embedding; that is no table of tokens.
    return [path for path in paths if path is not None and "weight" in adapted.index.slots[path].module._parameters]


def embeddings_to_save(adapted: AdaptedModel, name: str, wanted: bool | Literal["auto"]) -> dict[str, nn.Parameter]:
    if not wanted:
        return {}
    found = {
        path: adapted.original(f"{path}.weight") for path in _embedding_paths(adapted) if path not in adapted.saved
    }
    if wanted == "auto":
        before = _earlier_vocabulary(adapted, adapted.peft_config[name])
        if before is None:
            return {}
        # A table of which every new row is trained needs nothing but these rows.
        rows = adapted.tokens.covered(name)
        new = {path: range(min(before, len(table) - 1), len(table)) for path, table in found.items()}
        found = {path: table for path, table in found.items() if not rows.get(path, frozenset()).issuperset(new[path])}
    if found and wanted == "auto":
        warnings.warn(
            f"The vocabulary was resized, so {listed(found)} is saved whole with the adapter; pass "
            "save_embedding_layers=False to leave it out, or train its new rows alone with trainable_token_indices.",
            stacklevel=4,
        )
    return found


def _earlier_vocabulary(adapted: AdaptedModel, config: PeftConfig) -> int | None:
    """The size of the vocabulary in the model's checkpoint when it is another, as far as local files can tell."""
    now = getattr(getattr(adapted.model, "config", None), "vocab_size", None)
    name = config.base_model_name_or_path
    if now is None or not name:
        return None
    if Path(name).is_dir():
        path = Path(name) / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    if not path.is_file():
        return None
    before = read_json(path).get("vocab_size")
    return before if isinstance(before, int) and before != now else None


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tables are equal in the coarser of their dtypes: a base may be loaded in another precision."""
    coarse = a.dtype if torch.finfo(a.dtype).eps > torch.finfo(b.dtype).eps else b.dtype
    return torch.equal(a.to(b.device, coarse), b.to(coarse))


def embeddings_in(
    adapted: AdaptedModel, left: dict[str, Tensor], problems: list[str], prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Whole embedding weights beside an adapter: PEFT writes them for targeted and for resized embeddings.

    Returns:
        Those that differ from the base's, by parameter name, and the paths of all. A base on the meta device has no
        values to compare, so that all are taken to differ.
    """
    found: dict[str, Tensor] = {}
    brought: list[str] = []
    for path in _embedding_paths(adapted):
        for inner in ("base_layer.", "token_adapter.base_layer.", ""):
            key = f"{prefix}{path}.{inner}weight"
            if key not in left:
                continue
            tensor = left.pop(key)
            now = adapted.original(f"{path}.weight")
            if tensor.shape != now.shape:
                problems.append(
                    f"{key} has shape {tuple(tensor.shape)}, expected {tuple(now.shape)}: call "
                    f"model.resize_token_embeddings({tensor.shape[0]}) before loading"
                )
            elif now.is_meta or not same_values(tensor, now.detach()):
                found[f"{path}.weight"] = tensor
            brought.append(path)
    return found, brought
