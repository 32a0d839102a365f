"""An adapter's folder, in PEFT's format: written whole, read strictly, tensors from safetensors only."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.card import model_card
from veneer.adapters.embeddings import embeddings_in, embeddings_to_save
from veneer.adapters.fingerprint import differs, fingerprint
from veneer.adapters.names import Names
from veneer.adapters.rebase import made_again
from veneer.adapters.rows import TokenRows
from veneer.adapters.shared import checksum_of, saved_shared, with_shared
from veneer.adapters.targets import Selection, select
from veneer.adapters.ties import heads_in_file, tied_in_file
from veneer.adapters.tokens import KEY as ROWS
from veneer.core.config import PeftConfig, read_json
from veneer.core.disk import write_whole
from veneer.core.errors import AdapterFileError, BaseMismatchWarning, TargetError, UsageError, listed, nearest
from veneer.core.hub import CONFIG_NAME, WEIGHTS_NAME, locate

PREFIX = "base_model.model."
PICKLE_NAME = "adapter_model.bin"
FINGERPRINT = "base_fingerprint"
"""The key of a file's metadata that holds the mark of the base it was trained on."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as it was read from disk, not yet fitted to a model."""

    source: str
    config: PeftConfig
    tensors: dict[str, Tensor]
    """Keyed as in the file."""
    metadata: dict[str, str]


@dataclass(frozen=True)
class Fitted:
    """A file's tensors sorted to where they belong on one model."""

    selection: Selection
    factors: dict[str, dict[str, Tensor]]
    """From layer path to tensors keyed as on disk."""
    whole: dict[str, dict[str, Tensor]]
    """From the path of a module saved whole to its state dict."""
    biases: dict[str, Tensor]
    """From the base's bias name to its trained value."""
    embeddings: dict[str, Tensor]
    """From the base's embedding weight name to the weight that the adapter was trained with, where it is another."""
    brought: tuple[str, ...]
    """The paths of all embeddings in the file."""


def adapter_state(
    adapted: AdaptedModel, name: str, *, state_dict: Mapping[str, Tensor] | None = None, packed: bool = True
) -> dict[str, Tensor]:
    """Every tensor of an adapter, keyed as PEFT's files are.

    Args:
        adapted: the model.
        name: the adapter.
        state_dict: a full state dict to take values from, when the model's own are sharded; keyed as
            ``PeftModel.state_dict()``.
        packed: only what of each tensor goes into a file (AdaLoRA leaves out ranks that it took away).
    """
    own: dict[str, tuple[str, Tensor]] = {}
    tensor: Tensor
    here, there = adapted.names(), adapted.names(name)
    for path, layer in adapted.layers_of(name).items():
        for key, tensor in layer.tensors(name).items():
            spec = layer.specs[name][key]
            if not spec.saved:
                continue
            container, _, leaf = key.partition(".")
            memory = f"{here.wrapper(path)}.{container}.{name}" + (f".{leaf}" if leaf else "")
            own[f"{there.wrapper(path)}.{spec.file_key or key}"] = (memory, tensor)
    for path, wrapper in adapted.saved_of(name).items():
        for key, tensor in wrapper.modules_to_save[name].state_dict().items():
            own[f"{path}.{key}"] = (f"{path}.modules_to_save.{name}.{key}", tensor)
    for path, rows in adapted.tokens.of(name).items():
        own[f"{path}.{ROWS}"] = (f"{path}.{ROWS}.{name}", rows)
    if name in adapted.biases.trained:
        shown = adapted.biases.shown == name
        for key, value in adapted.biases.values(name).items():
            # A merged lora_bias is in the live bias, and not in the one that was trained.
            tensor = adapted.original(key) if shown else value
            own[there.parameter(key)] = (here.parameter(key), tensor)
    found = {}
    for disk, (memory, tensor) in own.items():
        if state_dict is not None:
            full = state_dict.get(f"{PREFIX}{memory}")
            if full is None:
                raise AdapterFileError(f"The given state dict has no {PREFIX}{memory}; it must be the whole model's.")
            tensor = full
        found[f"{PREFIX}{disk}"] = tensor.detach()
    for key, source in heads_in_file(adapted, name, there).items():
        found[f"{PREFIX}{key}"] = found[f"{PREFIX}{source}"].t()
    for key, memory, tensor in saved_shared(adapted, name):
        found[key] = (tensor if state_dict is None else state_dict.get(memory, tensor)).detach()
    if packed:
        for path, layer in adapted.layers_of(name).items():
            for key, spec in layer.specs[name].items():
                if spec.saved:
                    disk = f"{PREFIX}{there.wrapper(path)}.{spec.file_key or key}"
                    kept = layer.variants[name].in_file(key, found[disk], path, adapted.peft_config[name])
                    assert kept is not None
                    found[disk] = kept
    return dict(sorted(found.items()))


def save(
    adapted: AdaptedModel,
    name: str,
    folder: Path,
    *,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
    figures: Mapping[str, str] | None = None,
) -> None:
    """Write one adapter: weights, config and model card. An adapter that stood there is replaced as a whole.

    Args:
        adapted: the model.
        name: the adapter.
        folder: created when missing.
        save_embedding_layers: also write the base's embeddings whole. "auto" does so only when the vocabulary
            was resized, since then they are not those of the base.
        state_dict: see ``adapter_state``.
        figures: lines for the model card, e.g. a held-out loss.

    Raises:
        DiskError: the disk is full or not writable; what stood there before still stands.
    """
    config = adapted.peft_config[name]
    tensors = adapter_state(adapted, name, state_dict=state_dict)
    embeddings = embeddings_to_save(adapted, name, save_embedding_layers)
    for path, weight in embeddings.items():
        memory = f"{PREFIX}{adapted.names().parameter(f'{path}.weight')}"
        table = weight if state_dict is None else state_dict.get(memory, weight)
        inner = "base_layer." if path in adapted.layers else ""
        inner = "token_adapter.base_layer." if path in adapted.tokens.wrappers else inner
        tensors[f"{PREFIX}{path}.{inner}weight"] = table.detach()
    brought = [*adapted.saved_of(name), *embeddings, *adapted.tokens.covered(name)]
    metadata = {"format": "pt", FINGERPRINT: fingerprint(adapted, brought), **checksum_of(adapted, name)}
    ready = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in ready.values())
    card = model_card(config, adapted.reports[name], bytes_on_disk=size, figures=figures or {})
    writers: dict[str, Any] = {
        WEIGHTS_NAME: lambda path: write_tensors(_unshared(ready), path, metadata),
        CONFIG_NAME: lambda path: path.write_text(config.to_json() + "\n", encoding="utf-8"),
    }
    if card.may_replace(folder / "README.md"):
        writers["README.md"] = lambda path: path.write_text(card.text, encoding="utf-8")
    write_whole(folder, writers)


def read(source: str | Path, config: PeftConfig | None = None, **where: Any) -> AdapterFiles:
    """Read an adapter from a folder or, when online, from the hub. Nothing is executed or unpickled.

    Args:
        source: the folder or hub name.
        config: used instead of the folder's own.
        where: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        UsageError: no such folder, or a file of it is missing.
        AdapterFileError: broken, pickled or non-finite tensors.
        ConfigError: a config that this release cannot honour.
    """
    if config is None:
        config_path = locate(source, CONFIG_NAME, **where)
        config = PeftConfig.from_dict(read_json(config_path), source=str(config_path))
    try:
        path = locate(source, WEIGHTS_NAME, **where)
    except UsageError:
        pickled = Path(source) / (where.get("subfolder") or "") / PICKLE_NAME
        if pickled.is_file():
            raise AdapterFileError(
                f"{pickled} is a pickle, which can run code when it is read; veneer reads {WEIGHTS_NAME} only. "
                "Save the adapter again with safe_serialization=True where you trust it."
            ) from None
        raise
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is not a complete safetensors file: {error}.") from None
    for key, tensor in tensors.items():
        if tensor.is_complex():
            raise AdapterFileError(f"{path} holds {tensor.dtype} in {key}, expected floating-point numbers.")
        if tensor.is_floating_point() and not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():
            raise AdapterFileError(f"{path} has values that are not finite in {key}.")
    return AdapterFiles(str(path), config, tensors, metadata)


@final
class _Left:
    """The tensors of a file that have not found a place yet, and what is wrong with those that were looked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.problems: list[str] = []

    def take(self, key: str, shape: tuple[int, ...], floating: bool = True) -> Tensor | None:
        """A tensor of this shape, taken out; None when there is a problem with it, which is noted."""
        tensor = self.tensors.pop(f"{PREFIX}{key}", None)
        if tensor is None:
            self.problems.append(f"{PREFIX}{key} is missing")
        elif tuple(tensor.shape) != tuple(shape):
            self.problems.append(f"{PREFIX}{key} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        elif floating and not tensor.is_floating_point():
            self.problems.append(f"{PREFIX}{key} holds {tensor.dtype}, expected floating-point numbers")
        else:
            return tensor
        return None

    def drop_doubles(self, whole: Iterable[str], rows: Iterable[TokenRows]) -> None:
        """Leave out what PEFT writes more than once, and reads once."""
        # The rows again for a tied head, when it writes whole embeddings.
        again = {f"{PREFIX}{path}.{ROWS}" for each in rows for path in each.paths}
        # With bias="all" the biases of a module saved whole, three times.
        inside = tuple(f"{PREFIX}{path}.{name}." for path in whole for name in ("original_module", "modules_to_save"))
        self.tensors = {k: t for k, t in self.tensors.items() if k not in again and not k.startswith(inside)}


def fit(adapted: AdaptedModel, files: AdapterFiles) -> Fitted:
    """Sort a file's tensors to the layers of a model, every one of them and no other.

    Raises:
        AdapterFileError: a tensor that the model and config have no place for, a missing one, or one of another
            shape; all are named.
    """
    try:
        selection = select(adapted.index, files.config, from_file=True)
    except TargetError as error:
        raise AdapterFileError(f"{files.source} does not fit this model: {error}{_other_model(files.config)}") from None
    adapted.refuse_overlap([target.slot.path for target in selection.targets], [s.path for s in selection.saved])
    left = _Left(files.tensors)
    take = left.take
    remade = made_again(files.source, files.tensors, selection.config, selection.targets)
    names = Names(target.slot for target in selection.targets)
    heads = {path: PREFIX + names.wrapper(path) for path in names.owners}
    left.problems += tied_in_file(heads, selection, left.tensors, PREFIX)
    factors = {
        target.slot.path: {
            key: take(f"{names.wrapper(target.slot.path)}.{spec.file_key or key}", spec.shape)
            for key, spec in target.on_disk().items()
            if key not in remade
        }
        for target in selection.targets
    }
    whole = {
        slot.path: {
            key: take(f"{slot.path}.{key}", tuple(now.shape), now.is_floating_point())
            for key, now in slot.module.state_dict().items()
        }
        for slot in selection.saved
    }
    biases = {}
    for bias in selection.biases:
        biases[bias] = take(names.parameter(bias), tuple(adapted.original(bias).shape))
    rows = [replace(each, values=take(f"{each.slot.path}.{ROWS}", each.shape)) for each in selection.tokens]
    left.drop_doubles(whole, rows)
    problems, unplaced = left.problems, left.tensors
    selection = replace(selection, tokens=tuple(rows))
    if not problems:
        selection = with_shared(selection, unplaced, files.metadata, problems, files.source)
    else:
        # What layers share is made in the sizes that the config gives, which may be any; it has no layer in its name.
        unplaced = {key: tensor for key, tensor in unplaced.items() if "." in key.removeprefix(PREFIX)}
    embeddings, brought = embeddings_in(adapted, unplaced, problems, PREFIX)
    if unplaced:
        expected = [f"{PREFIX}{names.wrapper(path)}.{key}" for path, keyed in factors.items() for key in keyed]
        expected += [f"{PREFIX}{path}.{key}" for path, keyed in whole.items() for key in keyed]
        problems.extend(f"{key} has no place in this model{_clause(key, expected)}" for key in unplaced)
    if problems:
        raise AdapterFileError(
            f"{files.source} does not fit this model and its config: {listed(problems, most=5)}."
            f"{_other_model(files.config)}"
        )
    return Fitted(selection, factors, whole, biases, embeddings, tuple(brought))  # type: ignore[arg-type]


def warn_of_other_base(
    adapted: AdaptedModel, files: AdapterFiles, fitted: Fitted, *, read: Callable[[str], Tensor] | None = None
) -> None:
    """Warn when the base's weights are not those that the adapter was trained on, if the file tells.

    Args:
        adapted: the model.
        files: the adapter as it was read.
        fitted: the same, sorted to the model.
        read: gives the value of a parameter by its name, for a model that has none itself.
    """
    saved = files.metadata.get(FINGERPRINT)
    if saved is None:
        return
    rows = [path for each in fitted.selection.tokens for path in each.paths]
    clause = differs(saved, fingerprint(adapted, [*fitted.whole, *fitted.brought, *rows], read=read))
    if clause is not None:
        warnings.warn(
            f"This adapter was trained on another base model: {clause} from those of "
            f"{files.config.base_model_name_or_path!r} at the time it was saved; its outputs will not be the same.",
            BaseMismatchWarning,
            stacklevel=4,
        )


def _clause(key: str, expected: list[str]) -> str:
    close = nearest(key, expected, most=1).strip()
    return f" ({close.rstrip('?').replace('Did you mean', 'nearest')})" if close else ""


def _other_model(config: PeftConfig) -> str:
    name = config.base_model_name_or_path
    return f" The adapter was made for {name!r}." if name else ""


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file: equal bytes for equal content.

    Raises:
        OSError: with the reason, which the writer itself hides in an error of its own.
    """
    try:
        safetensors.torch.save_file(tensors, path, metadata=metadata)
    except safetensors.SafetensorError as error:
        # What it says is "... I/O error: No space left on device (os error 28)".
        raise OSError(str(error)) from error
    _order_metadata(path)


def _order_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place; its writer gives them in an order that is drawn anew."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # The same text in another order, before the spaces that fill the header up.
        if len(ordered) <= size:
            file.seek(8)
            file.write(ordered.ljust(size))


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies where two keys share memory (tied heads), which safetensors refuses to write."""
    seen: set[int] = set()
    out = {}
    for key, tensor in tensors.items():
        out[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return out
