"""A LoRA as one GGUF file, as llama.cpp reads it (``--lora``).

llama.cpp scales every pair of factors by ``adapter.lora.alpha`` over the rank of that pair. Layers with another factor
than the most have the difference in their B. Some architectures store the rows of the query and key projections in
another order than transformers, which the rows of B follow.

Shape legend: V vocabulary, O outputs, R rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from veneer.adapters.derived import FileLayer, layers_in
from veneer.adapters.files import PREFIX, AdapterFiles
from veneer.adapters.plain import invocation
from veneer.core.disk import write_whole
from veneer.core.errors import UsageError, listed, nearest

if TYPE_CHECKING:
    import numpy as np

# From transformers' model type to llama.cpp's architecture, and whether it reorders queries and keys.
_ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
    "gemma3_text": ("GEMMA3", False),
}
_TABLE = "token_embd.weight"


@final
@dataclass(frozen=True)
class GgufReport:
    """What was written into a GGUF file."""

    architecture: str
    """llama.cpp's name of the base's architecture."""
    alpha: float
    """The one alpha of the file."""
    tensors: tuple[str, ...]
    """The base's tensors that the adapter is for, by their names in the base's GGUF file."""
    rescaled: tuple[str, ...]
    """Layers whose B carries a factor of their own."""
    bytes: int
    """The size of the tensors."""


def write_gguf(files: AdapterFiles, base: Mapping[str, Any], path: Path) -> GgufReport:
    """Write a plain LoRA as a GGUF file, whole or not at all.

    Args:
        files: the adapter.
        base: the base model's config, as in its ``config.json``.
        path: the file to write.

    Raises:
        UsageError: no plain LoRA, one with more than factors, an architecture or a layer that has no known place in
            a GGUF file, or the package gguf is not installed.
        DiskError: the file could not be written; what stood there before still stands.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError(
            "Writing GGUF needs the package gguf, which is not installed; add it with pip install 'veneer[demo]'."
        ) from None
    kind = str(base.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise UsageError(
            f"The base is a {kind!r}, whose names and layout in a GGUF file are not known here; known: "
            f"{', '.join(_ARCHITECTURES)}.{nearest(kind, _ARCHITECTURES)}"
        )
    name, reorders = _ARCHITECTURES[kind]
    layers, rest = layers_in(files)
    _refuse_rest(files, rest, layers, base)
    alpha, factors = _one_alpha(layers)
    architecture = gguf.MODEL_ARCH[name]
    places = gguf.get_tensor_name_map(architecture, int(base["num_hidden_layers"]))
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    targets = []
    for layer_path, layer in layers.items():
        target = _place(places.get_name(layer_path), layer_path, kind, base)
        heads = _heads(layer_path, base) if reorders else None
        arrays |= _arrays(target, layer, factors[layer_path], heads)
        targets.append(target)

    own = gguf.MODEL_ARCH_NAMES[architecture]
    write_whole(path.parent, {path.name: lambda beside: _write(beside, own, alpha, invocation(files.config), arrays)})
    size = sum(array.nbytes for array in arrays.values())
    rescaled = tuple(layer_path for layer_path, factor in factors.items() if factor != 1.0)
    return GgufReport(own, alpha, tuple(targets), rescaled, size)


def _write(
    path: Path, architecture: str, alpha: float, tokens: Sequence[int], arrays: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if tokens:
        key, kinds = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, gguf.GGUFValueType
        writer.add_key_value(key, list(tokens), kinds.ARRAY, kinds.UINT32)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _refuse_rest(
    files: AdapterFiles, rest: Mapping[str, Tensor], layers: Mapping[str, FileLayer], base: Mapping[str, Any]
) -> None:
    biased = [path for path, layer in layers.items() if layer.bias is not None]
    if biased:
        raise UsageError(
            f"{files.source} has biases beside B on {len(biased)} layers, which a GGUF adapter has no place for; merge "
            "it into the base with veneer merge, and convert the merged model."
        )
    # PEFT writes the base's own table beside an adapted embedding; with another number of rows it is not that one.
    own = {
        key
        for key, tensor in rest.items()
        if key.endswith(".base_layer.weight") and tensor.dim() == 2 and tensor.shape[0] == base.get("vocab_size")
    }
    other = sorted(key.removeprefix(PREFIX) for key in rest.keys() - own)
    if other:
        raise UsageError(
            f"{files.source} holds more than factors, which a GGUF adapter has no place for: {listed(other, most=3)}; "
            "merge it into the base with veneer merge, and convert the merged model."
        )


def _one_alpha(layers: Mapping[str, FileLayer]) -> tuple[float, dict[str, float]]:
    """The alpha of the most layers, and the factor for the B of each layer that makes it right there."""
    parts = {path: layer.factors() for path, layer in layers.items()}
    alphas = {path: scaling * A.shape[0] for path, (A, _, scaling) in parts.items()}
    common = Counter(alphas.values()).most_common(1)[0][0]
    return common, {path: alpha / common for path, alpha in alphas.items()}


def _place(found: str | None, path: str, kind: str, base: Mapping[str, Any]) -> str:
    if found is None:
        raise UsageError(f"{path!r} has no place in a GGUF file of a {kind!r}; leave it out of target_modules.")
    name = f"{found}.weight"
    if base.get("tie_word_embeddings") and name in (_TABLE, "output.weight"):
        raise UsageError(
            f"The base's embedding and head share one table, which llama.cpp holds once and applies an adapter's "
            f"{path!r} to as neither; leave it out of target_modules, or merge with veneer merge."
        )
    return name


def _heads(path: str, base: Mapping[str, Any]) -> int | None:
    """The heads whose rows are reordered, if this is a query or key projection."""
    leaf = path.rpartition(".")[2]
    if leaf == "q_proj":
        return int(base["num_attention_heads"])
    return int(base.get("num_key_value_heads") or base["num_attention_heads"]) if leaf == "k_proj" else None


def _arrays(target: str, layer: FileLayer, factor: float, heads: int | None) -> dict[str, np.ndarray[Any, Any]]:
    A_RI, B_OR, _ = layer.factors()
    # In float64, so that a factor of 1 leaves every value as it is and any other is rounded once.
    B_OR = B_OR.double() * factor
    if heads is not None:
        rows, r = B_OR.shape
        # The two halves of each head, which rotate together, become neighbours.
        B_OR = B_OR.reshape(heads, 2, rows // heads // 2, r).transpose(1, 2).reshape(rows, r)
    # A table is looked up by row, so its A is stored as (V, R).
    A = A_RI.T if target == _TABLE else A_RI
    return {
        f"{target}.lora_a": A.float().contiguous().numpy(),
        f"{target}.lora_b": B_OR.float().contiguous().numpy(),
    }
