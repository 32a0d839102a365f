"""``veneer merge``: adapters merged into a model that plain transformers loads, checked before it is left."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from safetensors import SafetensorError

from veneer.cli.generate import adapter_names, with_adapters
from veneer.cli.output import console
from veneer.core.errors import DiskError, MergeError, UsageError, VeneerError
from veneer.core.records import MergeReport

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from veneer.adapters.model import PeftModel


def merge(
    model: Annotated[str, typer.Option(help="The base model: a folder, or a hub name.", show_default=False)],
    adapter: Annotated[
        list[str], typer.Option(metavar="RUN", help="A run or adapter folder; repeat it to add several up.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the merged model; must not exist.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's own.")] = "auto",
) -> MergeReport:
    """Merge adapters into their base model and write it as a plain transformers model.

    The written model is loaded again and its logits are compared with those of the unmerged one. If they differ
    by more than rounding, the merge fails and nothing is left.

    Example: veneer merge --model ./model --adapter ./run --output ./merged
    """
    from veneer.report.tables import merge_table

    report = merge_into_folder(model, adapter, output, dtype=dtype)
    console().print(merge_table(report, str(output)))
    return report


def merge_into_folder(model: str | Path, adapters: list[str], output: Path, *, dtype: str = "auto") -> MergeReport:
    """Write the merged model with its tokenizer into a new folder, all of it or nothing.

    Args:
        model: the base model's folder or hub name.
        adapters: run or adapter folders; several add up.
        output: a folder that does not exist yet.
        dtype: the precision of the merged weights; "auto" keeps the base's.

    Raises:
        UsageError: the output exists, or there is no such model or adapter.
        MergeError: the merged model's logits differ from the unmerged one's by more than rounding.
        DiskError: the model could not be written.
    """
    from veneer.adapters import files
    from veneer.core.task_type import TaskType
    from veneer.evaluate.equality import fixed_input, outputs
    from veneer.tasks.loading import AUTO_CLASSES, adapter_folder, load_model

    if output.exists():
        raise UsageError(f"The output {str(output)!r} exists already; give the name of a new folder.")
    folders = [adapter_folder(path) for path in adapters]
    names = adapter_names(adapters)
    task = TaskType(files.read(folders[0]).config.task_type or TaskType.CAUSAL_LM)
    base = load_model(model, auto_class=AUTO_CLASSES[task], dtype=dtype)
    model_class, precision = type(base), base.dtype
    adapted = with_adapters(base, folders, names)
    adapted.set_adapter(names, inference_mode=True)
    given = fixed_input(base)
    expected, effect = _before(adapted, given)
    layers = sum(1 for layer in adapted.base_model.layers.values() if layer.active_adapters)
    # Held in one place only, so that writing can let go of it: two copies of a large model may not fit.
    merged: list[Any] = [adapted.merge_and_unload(safe_merge=True)]
    del base, adapted

    def write(folder: Path) -> None:
        merged.pop().save_pretrained(folder)
        gc.collect()
        _copy_tokenizer([*folders, Path(model).expanduser()], model, folder)

    def check(folder: Path) -> MergeReport:
        found = outputs(model_class.from_pretrained(folder, dtype=precision), given)
        largest, scale = _compared(expected, found, precision, effect, output)
        return MergeReport(tuple(names), layers, _name(precision), largest, scale)

    return _into_place(output, write, check)


def _before(adapted: PeftModel, given: dict[str, Tensor]) -> tuple[Tensor, float]:
    """The unmerged outputs, and how much of them is the adapters' doing."""
    from veneer.evaluate.equality import outputs

    expected = outputs(adapted, given)
    with adapted.disable_adapter():
        return expected, (expected - outputs(adapted, given)).abs().max().item()


def _compared(
    expected: Tensor, found: Tensor, precision: torch.dtype, effect: float, output: Path
) -> tuple[float, float]:
    """The largest difference of an output and the largest output.

    Raises:
        MergeError: the difference is more than rounding.
    """
    from veneer.evaluate.equality import difference

    compared = difference(expected, found, precision)
    if not compared.equal:
        raise MergeError(
            f"The merged model's logits differ from the unmerged one's by up to {compared.largest:.3g} of "
            f"{compared.scale:.3g}, more than rounding in {_name(precision)} explains ({compared.bound:.3g}); "
            f"{str(output)!r} was not written."
        )
    if compared.largest > effect / 2:
        warnings.warn(
            f"In {_name(precision)}, rounding ({compared.largest:.3g}) hides half or more of what the adapter "
            f"changes ({effect:.3g}); merge with --dtype float32 to keep it.",
            stacklevel=2,
        )
    return compared.largest, compared.scale


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copy_tokenizer(candidates: list[Path], model: str | Path, folder: Path) -> None:
    """The tokenizer that the adapter was trained with, else the base's; a model without one is told of."""
    from veneer.tasks.loading import load_tokenizer

    source = next((str(path) for path in candidates if (path / "tokenizer_config.json").is_file()), str(model))
    try:
        load_tokenizer(source).save_pretrained(folder)
    except UsageError as error:
        warnings.warn(f"The merged model has no tokenizer: {error}", stacklevel=2)


def _into_place(output: Path, write: Callable[[Path], None], check: Callable[[Path], MergeReport]) -> MergeReport:
    """Write beside, check, then rename: a folder of the output's name is always complete."""
    beside = output.parent / f".{output.name}.{os.getpid()}.tmp"
    try:
        beside.mkdir(parents=True)
        write(beside)
        report = check(beside)
        beside.rename(output)
    except VeneerError:
        raise
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DiskError(f"Could not write {str(output)!r}: {reason}; nothing was left.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return report
