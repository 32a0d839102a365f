"""``veneer inspect``: what a model is made of and what a config would adapt, or what an adapter holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.fields import adapter_config, adapter_options
from veneer.cli.output import console
from veneer.core.errors import TargetError, UsageError
from veneer.core.hub import CONFIG_NAME
from veneer.core.records import LayerNorms, MatchReport, ModuleRecord
from veneer.train.families import adapter_fields

if TYPE_CHECKING:
    from torch import Tensor

    from veneer.adapters.index import ModuleIndex


@adapter_options
def inspect_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub name, an adapter, or a run.")],
    task: Annotated[str | None, typer.Option(help="Build the model for this task, e.g. causal_lm or seq_cls.")] = None,
    *,
    adapter_values: dict[str, Any],
) -> dict[str, Any]:
    """Show a model's modules and what a config would adapt, before anything is trained.

    Only the model's config.json is needed: no weights are read. For an adapter or a run folder, shows its config
    and the size of what each layer learned.

    Example: veneer inspect ./model --r 16 --target-modules q_proj,v_proj
    """
    if _holds_adapter(Path(model)):
        if adapter_values or task:
            raise UsageError(f"{model!r} is an adapter: its config is fixed, so flags for one have no meaning here.")
        return _adapter(model)
    return _model(model, task, adapter_values)


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
        console(stderr=True).print(problem, style="yellow", markup=False)
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


def _adapter(name: str) -> dict[str, Any]:
    import dataclasses

    from veneer.adapters import files
    from veneer.report.tables import facts, megabytes, norm_table
    from veneer.tasks.loading import adapter_folder

    folder = adapter_folder(name)
    read = files.read(folder)
    defaults = {f.name: f.default for f in dataclasses.fields(read.config)}
    shown = {"r", "lora_alpha", "task_type", "base_model_name_or_path", *adapter_fields()}
    config = {
        key: value
        for key, value in dataclasses.asdict(read.config).items()
        if key in shown and (key in ("r", "lora_alpha") or (value and value != defaults[key]))
    }
    layers = layer_norms(read.config, read.tensors)
    whole = [key for key in read.tensors if not any(key.startswith(_key_of(layer)) for layer in layers)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in read.tensors.values())
    parameters = sum(tensor.numel() for tensor in read.tensors.values())
    screen = console()
    head = facts({"adapter": str(folder), "parameters": f"{parameters:,}", "size": megabytes(size)})
    screen.print(head, "", facts(config, title="Config"), "", norm_table(layers), sep="\n")

    if whole:
        screen.print(facts({key: tuple(read.tensors[key].shape) for key in whole}, title="Other tensors"))
    if layers and all(layer.update_norm == 0.0 for layer in layers):
        console(stderr=True).print("Every update is zero: this adapter changes nothing.", style="yellow")
    return {
        "adapter": str(folder),
        "config": read.config.to_dict(),
        "parameters": parameters,
        "bytes": size,
        "layers": layers,
        "other_tensors": whole,
    }


def _key_of(layer: LayerNorms) -> str:
    from veneer.adapters.files import PREFIX

    return f"{PREFIX}{layer.path}.lora_"


def layer_norms(config: Any, tensors: dict[str, Tensor]) -> list[LayerNorms]:
    """The norms of every pair of factors in an adapter's file.

    The norm of B A is taken from the two (r, r) Gram matrices, so that no (out, in) matrix is made.
    """
    from veneer.adapters.files import PREFIX
    from veneer.core.variant import variant_of

    variant = variant_of(config)
    found = []
    for key, A in tensors.items():
        for name_a, name_b in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            path = key.removeprefix(PREFIX).removesuffix(name_a)
            B = tensors.get(f"{PREFIX}{path}{name_b}")
            if not key.endswith(name_a) or B is None:
                continue
            A_RI, B_OR = A.double().flatten(1), B.double().flatten(1)
            r = A_RI.shape[0]
            scaling = variant.scaling(r, _alpha(config, path), config)
            product = ((A_RI @ A_RI.T) * (B_OR.T @ B_OR)).sum().clamp(min=0).sqrt().item()
            norms = (A_RI.norm().item(), B_OR.norm().item(), scaling * product)
            found.append(LayerNorms(path, r, scaling, *norms))
    return sorted(
        found, key=lambda layer: [part.zfill(6) if part.isdigit() else part for part in layer.path.split(".")]
    )


def _alpha(config: Any, path: str) -> float:
    """The alpha on a layer: of the first pattern that its path ends in, else the config's."""
    import re

    matching = (value for pattern, value in config.alpha_pattern.items() if re.match(rf"(.*\.)?({pattern})$", path))
    return float(next(matching, config.lora_alpha))
