"""``veneer extract``: a LoRA from the difference between a full fine-tune and its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.fields import adapter_config, adapter_values
from veneer.cli.output import console
from veneer.cli.rank_choice import ENERGY_HELP, R_HELP, rank_from
from veneer.core.errors import UsageError

if TYPE_CHECKING:
    from veneer.adapters.extract import Extraction
    from veneer.adapters.lowrank import Rank


def extract(
    base: Annotated[str, typer.Option(help="The model that the fine-tune started from.", show_default=False)],
    tuned: Annotated[str, typer.Option(help="The fine-tuned model.", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the adapter.", show_default=False)],
    r: Annotated[int | None, typer.Option("--r", help=R_HELP, show_default=False)] = None,
    energy: Annotated[float | None, typer.Option(help=ENERGY_HELP, show_default=False)] = None,
    target_modules: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="The layers to look at; by default all linear ones.")
    ] = None,
    exclude_modules: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Layers to leave out of them.")
    ] = None,
    modules_to_save: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Modules to keep whole, as they are in the fine-tune.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that stands at the output.")] = False,
) -> dict[str, Any]:
    """Make a LoRA of what a full fine-tune changed.

    Each weight's change becomes its best approximation at the rank asked for. The models are read from their
    safetensors files weight by weight, so neither has to fit into memory. Whatever changed and is not in the
    adapter (norms, biases, embeddings, other layers) is named.

    Example: veneer extract --base ./model --tuned ./tuned --r 16 --output ./adapter
    """
    from veneer.adapters.derived import check_output, write
    from veneer.report.approximations import error_overall, kept_overall, percent
    from veneer.tasks.loading import model_folder

    rank = rank_from(r, energy)
    if rank is None:
        raise UsageError("Neither --r nor --energy is given; say which rank, or which share of the energy, to keep.")
    check_output(output, force=force)
    texts = {
        "target_modules": target_modules or ["all-linear"],
        "exclude_modules": exclude_modules,
        "modules_to_save": modules_to_save,
    }
    found = _extracted(base, tuned, rank, adapter_values(texts))
    kept = kept_overall(found.layers)
    figures = {
        "made from": f"what changed from {base} to {tuned}",
        "energy kept": percent(kept),
        "changed and not in here": f"{len(found.left_out)} tensors",
    }
    size = write(output, found.files, figures=figures, beside=model_folder(tuned))
    _show(found, tuned, size, output)
    return {
        "base": base,
        "tuned": tuned,
        "output": output,
        "bytes": size,
        "kept": kept,
        "error": error_overall(found.layers),
        "layers": found.layers,
        "unchanged": found.unchanged,
        "left_out": found.left_out,
    }


def _extracted(base: str, tuned: str, rank: Rank, values: dict[str, Any]) -> Extraction:
    from veneer.adapters.extract import extract as extracted
    from veneer.cli.weights import architecture, counting, opened, task_of
    from veneer.tasks.loading import load_config

    from_config, to_config = load_config(base), load_config(tuned)
    if from_config.model_type != to_config.model_type:
        raise UsageError(
            f"The base is a {from_config.model_type} and the fine-tune a {to_config.model_type}; expected two models "
            "of the same architecture."
        )
    model_class = architecture(to_config, tuned)
    config = adapter_config(values, task_type=task_of(model_class), base_model_name_or_path=base, inference_mode=True)
    model, before = opened(base, model_class)
    _, after = opened(tuned, model_class)
    with counting("weights") as said:
        return extracted(model, before, after, config, rank, said=said)


def _show(found: Extraction, tuned: str, size: int, output: Path) -> None:
    from veneer.report.approximations import (
        approximation_table,
        error_overall,
        kept_overall,
        left_out_table,
        percent,
        shown_ranks,
    )
    from veneer.report.tables import facts, megabytes

    shown = {
        "energy kept": percent(kept_overall(found.layers)),
        "relative error": f"{error_overall(found.layers):.2g}",
        "ranks": shown_ranks(found.layers),
        "unchanged layers, left out": len(found.unchanged),
        "changed and not in the adapter": f"{len(found.left_out)} tensors",
        "size": megabytes(size),
        "written to": str(output),
    }
    parts: list[Any] = [approximation_table(found.layers)]
    if found.left_out:
        parts.append(left_out_table(found.left_out))
    console().print(*parts, facts(shown), sep="\n")
    if found.left_out:
        console(stderr=True).print(
            f"{len(found.left_out)} tensors differ between {tuned!r} and its base and are not in the adapter, so it "
            "does not give the fine-tune's outputs alone; name their modules in --target-modules or --modules-to-save "
            "to have them in it.",
            style="yellow",
            markup=False,
        )
