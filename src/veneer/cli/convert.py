"""``veneer convert``: any adapter as plain LoRA, which every server reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.output import console
from veneer.cli.rank_choice import ENERGY_HELP, R_HELP, padding_note, rank_from
from veneer.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from veneer.adapters.adapted import AdaptedModel
    from veneer.core.records import ApproximatedLayer

FORMS = ("lora",)


def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A run or adapter folder.")],
    model: Annotated[str, typer.Option(help="The base model: a folder, or a hub name.", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the new adapter.", show_default=False)],
    to: Annotated[str, typer.Option(metavar="lora", help="The form to write.")] = FORMS[0],
    r: Annotated[
        int | None, typer.Option("--r", help=f"{R_HELP} By default the rank that is exact.", show_default=False)
    ] = None,
    energy: Annotated[float | None, typer.Option(help=ENERGY_HELP, show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that stands at the output.")] = False,
) -> dict[str, Any]:
    """Write any adapter as plain LoRA of the original base model.

    Without --r or --energy each layer is exact: LoRA and rsLoRA keep their factors, a start such as PiSSA is taken
    off at twice the rank, and updates that are of low rank in another form get factors of that rank. DoRA's is of
    full rank, so it needs --r or --energy and is met with the error that is shown. The base's weights are mapped
    from its files and read only where an update depends on them.

    Example: veneer convert ./run --model ./model --r 32 --output ./plain
    """
    from veneer.adapters.convert import convert as converted
    from veneer.adapters.convert import save
    from veneer.adapters.derived import check_output
    from veneer.cli.weights import counting
    from veneer.report.approximations import error_overall, kept_overall
    from veneer.tasks.loading import adapter_folder

    if to not in FORMS:
        raise UsageError(f"--to is {to!r}; expected {', '.join(FORMS)}.{nearest(to, FORMS)}")
    rank = rank_from(r, energy)
    folder = adapter_folder(adapter)
    check_output(output, force=force)
    adapted = _loaded(folder, model)
    source = adapted.peft_config[_NAME]
    with counting("layers") as said:
        found = converted(adapted, _NAME, rank, said=said)
    error = error_overall(found.layers)
    figures = {"made from": f"{folder}, of type {source.peft_type}", "relative error of the update": f"{error:.2g}"}
    size = save(output, adapted, _NAME, found.config, found.tensors, figures=figures, beside=folder)
    _show(found.layers, size, output)
    note = padding_note(found.layers) if rank is not None else None
    if note is not None:
        console(stderr=True).print(note, style="yellow", markup=False)
    return {
        "adapter": str(folder),
        "model": model,
        "to": to,
        "output": output,
        "kept": kept_overall(found.layers),
        "error": error,
        "bytes": size,
        "layers": found.layers,
        "notes": [note] if note else [],
    }


def _show(layers: Sequence[ApproximatedLayer], size: int, output: Path) -> None:
    from veneer.report.approximations import approximation_table, error_overall, kept_overall, percent, shown_ranks
    from veneer.report.tables import facts, megabytes

    shown = {
        "energy kept": percent(kept_overall(layers)),
        "relative error": f"{error_overall(layers):.2g}",
        "ranks": shown_ranks(layers),
        "size": megabytes(size),
        "written to": str(output),
    }
    console().print(approximation_table(layers), facts(shown), sep="\n")


_NAME = "default"


def _loaded(folder: Path, model: str) -> AdaptedModel:
    """The adapter on its base model, whose weights stay in their files."""
    from veneer.adapters import files
    from veneer.adapters.adapted import AdaptedModel
    from veneer.adapters.checkpoint import fill
    from veneer.adapters.loading import load_into
    from veneer.cli.weights import opened
    from veneer.core.task_type import TaskType
    from veneer.tasks.loading import AUTO_CLASSES

    read = files.read(folder)
    empty, checkpoint = opened(model, AUTO_CLASSES[TaskType(read.config.task_type or TaskType.CAUSAL_LM)])
    fill(empty, checkpoint)
    adapted = AdaptedModel(empty)
    load_into(adapted, _NAME, read, trainable=False, autocast_adapter_dtype=False)
    return adapted
