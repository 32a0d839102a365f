"""Adapter folders that are made from other files: read as plain LoRA, written whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapters.card import rewritten_card
from veneer.adapters.files import PREFIX, AdapterFiles, write_tensors
from veneer.adapters.plain import is_product, numbers
from veneer.adapters.rebase import initial_name
from veneer.core import registry
from veneer.core.config import TunerConfig
from veneer.core.disk import write_whole
from veneer.core.errors import AdapterFileError, UsageError
from veneer.core.hub import CONFIG_NAME, WEIGHTS_NAME
from veneer.core.lora_variant import BIAS
from veneer.core.variant import variant_of

_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_TOKENIZER = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|.*\.model|"
    r"chat_template\.(jinja|json)"
)


@dataclass(frozen=True)
class FileLayer:
    """One adapted layer of a plain LoRA's file. O outputs, I inputs, R rank."""

    names: tuple[str, str]
    """The names of A and B after the layer's path."""
    A: Tensor
    """As stored."""
    B: Tensor
    """As stored."""
    r: int
    """Its rank in the config."""
    scaling: float
    """The factor of the update."""
    started: tuple[Tensor, Tensor] | None
    """The frozen factors of its start, which are taken off, with the scaling in the second one."""
    bias: Tensor | None
    """(O,) bias beside B, without the scaling."""

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A (R, I), B (O, R) and the factor of their product. With a start, two pairs are stacked."""
        A, B = self.A.flatten(1), self.B.flatten(1)
        if self.started is None:
            return A, B, self.scaling
        A0, B0 = (factor.flatten(1) for factor in self.started)
        return torch.cat([A, A0]), torch.cat([B.double() * self.scaling, -B0.double()], 1), 1.0

    def product(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) in float64 whose product is the update."""
        A, B, scaling = self.factors()
        return A.double(), B.double() * scaling

    def stored(self, A_RI: Tensor, B_OR: Tensor) -> dict[str, Tensor]:
        """New factors in the shapes and dtypes of these, keyed by their names."""
        r = A_RI.shape[0]
        return {
            self.names[0]: A_RI.to(self.A.dtype).reshape(r, *self.A.shape[1:]).contiguous(),
            self.names[1]: B_OR.to(self.B.dtype).reshape(self.B.shape[0], r, *self.B.shape[2:]).contiguous(),
        }


def layers_in(files: AdapterFiles) -> tuple[dict[str, FileLayer], dict[str, Tensor]]:
    """The layers of a plain LoRA by path, and the tensors of the file that belong to none.

    Raises:
        UsageError: it is no plain LoRA, or started from a part of the base's weights.
        AdapterFileError: a factor is missing, or its shape is not that of its rank.
    """
    config, left = files.config, dict(files.tensors)
    assert isinstance(config, TunerConfig)
    variant = variant_of(config)
    if not is_product(variant):
        raise UsageError(
            f"{files.source} holds an adapter of type {_kind(config, variant)}, whose update is no product of two "
            "factors; make plain LoRA of it first, with veneer convert."
        )
    found = {}
    for key in files.tensors:
        for names in _PAIRS:
            if not key.startswith(PREFIX) or not key.endswith(f".{names[0]}"):
                continue
            path = key.removeprefix(PREFIX).removesuffix(f".{names[0]}")
            found[path] = _layer(files, config, path, names, left, variant.scaling)
    init = registry.load("inits", config.init).Init
    if (init.subtracts or init.moves) and any(layer.started is None for layer in found.values()):
        raise UsageError(
            f"{files.source} started from a part of the base's weights (init_lora_weights={config.init!r}), so its "
            "factors alone are not its update; make plain LoRA of it first, with veneer convert."
        )
    if not found:
        raise AdapterFileError(f"{files.source} has no pair of factors in it; expected the file of a LoRA.")
    return {path: found[path] for path in sorted(found, key=_in_order)}, left


def _in_order(path: str) -> list[str]:
    """Layer 2 comes before layer 10."""
    return [part.zfill(6) if part.isdigit() else part for part in path.split(".")]


def _kind(config: TunerConfig, variant: object) -> str:
    options = [name for name in getattr(variant, "options", {}) if getattr(config, name)]
    return f"{config.peft_type}" + (f" with {', '.join(options)}" if options else "")


def _layer(
    files: AdapterFiles,
    config: TunerConfig,
    path: str,
    names: tuple[str, str],
    left: dict[str, Tensor],
    scaling: Callable[[int, float, TunerConfig], float],
) -> FileLayer:
    r, alpha = numbers(config, path)
    prefix = f"{PREFIX}{path}."
    A, B = left.pop(prefix + names[0]), left.pop(prefix + names[1], None)
    if B is None:
        raise AdapterFileError(f"{files.source} has {prefix}{names[0]} but no {prefix}{names[1]}.")
    flat = B.dim() >= 2 and B.shape[2:].numel() == 1
    if A.dim() < 2 or not flat or A.shape[0] != r or B.shape[1] != r:
        raise AdapterFileError(
            f"The factors of {path!r} in {files.source} have shapes {tuple(A.shape)} and {tuple(B.shape)}; expected "
            f"two matrices of rank {r}, as its config says (those of experts and of grouped convolutions are several)."
        )
    A0, B0 = (left.pop(prefix + initial_name(name), None) for name in names)
    started = None if A0 is None or B0 is None else (A0, B0)
    return FileLayer(names, A, B, r, scaling(r, alpha, config), started, left.pop(prefix + BIAS, None))


def check_output(folder: Path, *, force: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        UsageError: the output exists, and ``force`` is not given or it holds something else than an adapter.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file()):
        raise UsageError(f"The output {str(folder)!r} exists and is no adapter's folder; give the name of a new one.")
    if not force and any(folder.iterdir()):
        raise UsageError(
            f"The output {str(folder)!r} exists already; give the name of a new folder, or --force to replace the "
            "adapter in it."
        )


def write(folder: Path, files: AdapterFiles, *, figures: Mapping[str, str], beside: Path | None = None) -> int:
    """Write an adapter's folder, all of it or nothing of it.

    Args:
        folder: created when missing; an adapter in it is replaced.
        files: config, tensors and metadata.
        figures: lines for the model card.
        beside: a folder whose tokenizer files are copied, so that the template of the training goes along.

    Returns:
        The size of the tensors in bytes.

    Raises:
        DiskError: the disk is full or not writable; what stood there before still stands.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in files.tensors.values())
    card = rewritten_card(files.config, bytes_on_disk=size, figures=figures)
    text = files.config.to_json() + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS_NAME: lambda path: write_tensors(dict(files.tensors), path, dict(files.metadata)),
        CONFIG_NAME: lambda path: path.write_text(text, encoding="utf-8"),
    }
    if card.may_replace(folder / "README.md"):
        writers["README.md"] = lambda path: path.write_text(card.text, encoding="utf-8")
    for source in sorted(beside.iterdir()) if beside is not None and beside.resolve() != folder.resolve() else ():
        if source.is_file() and _TOKENIZER.fullmatch(source.name):
            writers[source.name] = partial(shutil.copyfile, source)
    write_whole(folder, writers)
    return size
