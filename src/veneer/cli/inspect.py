"""``veneer inspect``: what a model is made of and what a config would adapt, or what an adapter holds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.fields import adapter_config, adapter_options
from veneer.cli.output import console
from veneer.core.errors import TargetError, UsageError, listed
from veneer.core.hub import CONFIG_NAME
from veneer.core.records import MatchReport, ModuleRecord
from veneer.train.families import adapter_fields

if TYPE_CHECKING:
    from veneer.adapters.files import AdapterFiles
    from veneer.adapters.index import ModuleIndex
    from veneer.adapters.updates import LayerUpdate
    from veneer.core.config import PeftConfig
    from veneer.core.records import AdapterSpectrum


@adapter_options
def inspect_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub name, an adapter, or a run.")],
    task: Annotated[str | None, typer.Option(help="Build the model for this task, e.g. causal_lm or seq_cls.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN", help="Another adapter or run: how far the two change the same.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="BASE", help="An adapter's base model, for updates that depend on its weights."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw what is told of an adapter, layers by modules.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the picture that is there.")] = False,
    *,
    adapter_values: dict[str, Any],
) -> dict[str, Any]:
    """Show a model's modules and what a config would adapt, before anything is trained.

    Only the model's config.json is needed: no weights are read.

    For an adapter or a run folder, shows its config and what each layer learned: the norm of its update, its effective
    rank, how many singular values hold 90, 95 and 99 % of its energy, and which layers are dead. With --against,
    shows how the updates of two adapters lie to each other.

    Example: veneer inspect ./model --r 16 --target-modules q_proj,v_proj
    """
    if not _holds_adapter(Path(model).expanduser()):
        flags = {"--against": against, "--model": base, "--plot": plot, "--force": force}
        given = [flag for flag, value in flags.items() if value]
        if given:
            raise UsageError(
                f"{given[0]} is about an adapter, and {model!r} holds none; give an adapter or run folder."
            )
        return _model(model, task, adapter_values)
    if adapter_values or task:
        raise UsageError(f"{model!r} is an adapter: its config is fixed, so flags for one have no meaning here.")
    _check_plot(plot, force=force)
    return _adapter(model, base, plot) if against is None else _overlap(model, against, base, plot)


def _check_plot(plot: Path | None, *, force: bool) -> None:
    """Refuse a picture that is there or cannot be, before anything is computed.

    Raises:
        UsageError: it is, or its name is not a PNG file's, or there is none to replace.
    """
    from veneer.report.heatmap import check_name

    if plot is None:
        if force:
            raise UsageError("--force replaces the picture of --plot, which is not given.")
        return
    check_name(plot)
    if plot.exists() and not force:
        raise UsageError(f"The picture {str(plot)!r} exists already; give another name, or use --force.")


def _holds_adapter(folder: Path) -> bool:
    return any((folder / part / CONFIG_NAME).is_file() for part in ("", "best", "last"))


def _model(name: str, task: str | None, values: dict[str, Any]) -> dict[str, Any]:
    from veneer.adapters.index import ModuleIndex
    from veneer.core.task_type import TaskType
    from veneer.report.tables import adaptable_table, facts, pattern_table, target_table
    from veneer.report.tree import module_tree
    from veneer.tasks.loading import AUTO_CLASSES, empty_model

    task_type = None if task is None else TaskType(task)
    config = adapter_config(values, task_type=task_type)
    model = empty_model(name, auto_class=None if task_type is None else AUTO_CLASSES[task_type])
    index = ModuleIndex(model)
    modules = module_records(type(model).__name__, index)
    report, problem = _matched(index, config, asked=bool(values or task))
    screen = console()
    size = modules[0].parameters
    shown = [facts({"model": name, "class": type(model).__name__, "parameters": f"{size:,}"}), ""]
    shown += [module_tree(modules), "", adaptable_table(modules)]
    if report is not None:
        shown += [pattern_table(report), target_table(report)]
    screen.print(*shown, sep="\n")
    if problem is not None:
        _say(problem)
    return {
        "model": name,
        "class": type(model).__name__,
        "model_type": index.model_type,
        "parameters": size,
        "modules": modules,
        "match": None if report is None else report.to_dict(),
    }


def _matched(index: ModuleIndex, config: Any, *, asked: bool) -> tuple[MatchReport | None, str | None]:
    """What the config matches. Without any flag, a model type that has no default targets is no mistake."""
    from veneer.adapters.targets import select

    try:
        return select(index, config).report, None
    except TargetError as error:
        if asked:
            raise
        return None, str(error)


def module_records(class_name: str, index: ModuleIndex) -> list[ModuleRecord]:
    """The model and each of its modules, shared parameters counted at their first owner."""
    from veneer.adapters.index import view

    sizes: Counter[str] = Counter()
    for name, size in index.parameter_sizes.items():
        parts = name.split(".")[:-1]
        for end in range(len(parts) + 1):
            sizes[".".join(parts[:end])] += size
    records = [ModuleRecord("", class_name, None, None, sizes[""])]
    for path, slot in index.slots.items():
        shape = None if slot.kind is None else view(slot).shape()
        records.append(ModuleRecord(path, type(slot.module).__name__, slot.kind, shape, sizes[path]))
    return records


def _adapter(name: str, base: str | None, plot: Path | None) -> dict[str, Any]:
    from veneer.adapters import files
    from veneer.adapters.spectrum import adapter_spectrum
    from veneer.report.heatmap import spectrum_map
    from veneer.report.spectra import spectrum_table
    from veneer.report.tables import facts, megabytes
    from veneer.tasks.loading import adapter_folder

    folder = adapter_folder(name)
    read = files.read(folder)
    spectrum = adapter_spectrum(_updates(folder, read, base))
    other = [key for key in read.tensors if not any(_is_of(key, layer.path) for layer in spectrum.layers)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in read.tensors.values())
    parameters = sum(tensor.numel() for tensor in read.tensors.values())
    head = {"adapter": str(folder), "parameters": f"{parameters:,}", "size": megabytes(size)}
    head["dead layers"] = f"{len(spectrum.dead)} of {len(spectrum.layers)}"
    screen = console()
    shown = [facts(head), "", facts(_settings(read.config), title="Config"), "", spectrum_table(spectrum)]
    screen.print(*shown, sep="\n")
    if other:
        screen.print(facts({key: tuple(read.tensors[key].shape) for key in other}, title="Other tensors"))
    _notes(spectrum)
    if plot is not None:
        spectrum_map(spectrum, plot, title=f"{_short(folder)}: what each layer learned")
    return {
        "adapter": str(folder),
        "config": read.config.to_dict(),
        "parameters": parameters,
        "bytes": size,
        "whole": spectrum.whole,
        "median_norm": spectrum.median_norm,
        "dead": spectrum.dead,
        "layers": spectrum.layers,
        "other_tensors": other,
        "plot": plot,
    }


def _overlap(first: str, second: str, base: str | None, plot: Path | None) -> dict[str, Any]:
    from veneer.adapters import files
    from veneer.adapters.spectrum import adapter_overlap
    from veneer.report.heatmap import overlap_map
    from veneer.report.spectra import overlap_table
    from veneer.report.tables import facts
    from veneer.tasks.loading import adapter_folder

    folders = [adapter_folder(name) for name in (first, second)]
    updates = [_updates(folder, files.read(folder), base) for folder in folders]
    overlap = adapter_overlap(*updates)
    head = facts({"first": str(folders[0]), "second": str(folders[1])})
    console().print(head, "", overlap_table(overlap), sep="\n")
    whole = all(update.whole for several in updates for update in several)
    if not whole:
        _say(_IN_PART)
    if plot is not None:
        overlap_map(overlap, plot, title=f"{_short(folders[0])} against {_short(folders[1])}")
    return {
        "adapter": str(folders[0]),
        "against": str(folders[1]),
        "whole": whole,
        **{field.name: getattr(overlap, field.name) for field in dataclasses.fields(overlap)},
        "plot": plot,
    }


_IN_PART = (
    "The updates depend on the base model's weights; this is only what the factors add to them. "
    "Name the base with --model to see the updates themselves."
)


def _updates(folder: Path, read: AdapterFiles, base: str | None) -> list[LayerUpdate]:
    """The updates of an adapter: from its file, or on its base when that is named."""
    from veneer.adapters.model import PeftModel
    from veneer.adapters.updates import updates_in_file, updates_on_model
    from veneer.core.task_type import TaskType
    from veneer.tasks.loading import AUTO_CLASSES, load_model

    if base is None:
        return updates_in_file(read)
    task = TaskType(read.config.task_type or TaskType.CAUSAL_LM)
    adapted = PeftModel.from_pretrained(load_model(base, auto_class=AUTO_CLASSES[task]), folder)
    return list(updates_on_model(adapted.base_model, "default"))


def _is_of(key: str, path: str) -> bool:
    """Whether a tensor of a file is part of a layer's update, and not of what is saved beside it."""
    from veneer.adapters.files import PREFIX

    return key.startswith(f"{PREFIX}{path}.") and not key.startswith(f"{PREFIX}{path}.base_layer.")


def _settings(config: PeftConfig) -> dict[str, Any]:
    """The fields of a config worth showing: rank and alpha, and what differs from its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    shown = {"r", "lora_alpha", "task_type", "base_model_name_or_path", *adapter_fields()}
    return {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key in shown and (key in ("r", "lora_alpha") or (value and value != defaults[key]))
    }


def _notes(spectrum: AdapterSpectrum) -> None:
    if not spectrum.whole:
        _say(_IN_PART)
    if not spectrum.median_norm:
        _say("Every update is zero: this adapter changes nothing.")
    elif spectrum.dead:
        _say(f"Dead layers, which learned next to nothing: {listed(spectrum.dead, most=4)}.")


def _say(text: str) -> None:
    console(stderr=True).print(text, style="yellow", markup=False)


def _short(folder: Path) -> str:
    """A name for a folder; of a run's best or last adapter, with that of the run."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:]) if parts[-1] in ("best", "last") else parts[-1]
