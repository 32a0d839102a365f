"""``veneer merge``: adapters merged into a model that plain transformers loads, checked before it is left."""

from __future__ import annotations

import gc
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from safetensors import SafetensorError

from veneer.cli.generate import adapter_names, with_adapters
from veneer.cli.output import console
from veneer.core.disk import write_folder
from veneer.core.errors import MergeError, NotStreamableError, UsageError, nearest
from veneer.core.records import MergeReport

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from veneer.adapters.model import PeftModel
    from veneer.adapters.streaming import StreamingMerge

FULL = "full"
"""Merge into the base in full precision."""
_INTO = (FULL, "dequantised", "requantised")
_CONFIG, _RUN = "config.json", "run.yaml"


def merge(
    model: Annotated[str, typer.Option(help="The base model: a folder, or a hub name.", show_default=False)],
    adapter: Annotated[
        list[str], typer.Option(metavar="RUN", help="A run or adapter folder; repeat it to add several up.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the merged model; must not exist.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's own.")] = "auto",
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the outputs before and after; by default where two models fit into free memory.",
            show_default=False,
        ),
    ] = None,
    into: Annotated[
        str,
        typer.Option(
            metavar="full|dequantised|requantised",
            help="The base in full precision; or, for an adapter trained with --quantize, that quantised base, "
            "as plain layers or quantised again.",
        ),
    ] = FULL,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier merge.")] = False,
) -> MergeReport:
    """Merge adapters into their base model and write it as a plain transformers model.

    The base is merged tensor by tensor: memory holds the largest tensor and the adapters, however large the model
    is. A checkpoint that transformers converts when it loads it, or one in another format, is loaded whole.

    To verify, base and merged model are loaded whole, one after the other, and their logits compared. If they differ
    by more than rounding, the merge fails and nothing is left. An --into that rounds by design is only measured.

    Example: veneer merge --model ./model --adapter ./run --output ./merged
    """
    from veneer.report.tables import merge_table

    report = merge_into_folder(model, adapter, output, dtype=dtype, verify=verify, into=into, force=force)
    console().print(merge_table(report, str(output)))
    return report


def merge_into_folder(
    model: str | Path,
    adapters: list[str],
    output: Path,
    *,
    dtype: str = "auto",
    verify: bool | None = None,
    into: str = FULL,
    force: bool = False,
) -> MergeReport:
    """Write the merged model with its tokenizer into a new folder, all of it or nothing.

    Args:
        model: the base model's folder or hub name.
        adapters: run or adapter folders; several add up.
        output: a folder that does not exist yet.
        dtype: the precision of the merged weights; "auto" keeps the base's.
        verify: load both models and compare their outputs; None does where free memory holds twice the model.
        into: the base that is merged into: "full" precision, or as it was quantised for training, which becomes
            plain layers ("dequantised") or is quantised again ("requantised").
        force: replace the output when it is a model's folder.

    Raises:
        UsageError: the output exists, or there is no such model or adapter, or ``into`` has no meaning for them.
        MergeError: the merged model's logits differ from the unmerged one's by more than rounding.
        DiskError: the model could not be written.
    """
    from veneer.tasks.loading import adapter_folder

    folders = [adapter_folder(path) for path in adapters]
    _check_output(output, [Path(model).expanduser(), *folders], force=force)
    job = _Job(model, folders, adapter_names(adapters), dtype, into, _quantisation(model, folders, into))
    streaming = job.streaming() if into == FULL else None
    if streaming is not None and verify is None:
        verify = _fits(streaming)
    report = _streamed(job, streaming, output, verify=bool(verify), force=force) if streaming else None
    return report or _in_memory(job, output, verify=verify is not False, force=force)


@dataclass(frozen=True)
class _Job:
    """What is to be merged into what."""

    model: str | Path
    folders: list[Path]
    names: list[str]
    dtype: str
    into: str
    quantisation: str | None
    """How the base is stored in memory: one of ``quantise.Quantisation``, or None in full precision."""

    @property
    def auto_class(self) -> str:
        """The transformers class for the task that the adapters are for."""
        from veneer.adapters import files
        from veneer.core.task_type import TaskType
        from veneer.tasks.loading import AUTO_CLASSES

        return AUTO_CLASSES[TaskType(files.read(self.folders[0]).config.task_type or TaskType.CAUSAL_LM)]

    @property
    def task_options(self) -> dict[str, Any]:
        """What the adapters' task asks of the model: the number and names of its labels, and a head that they bring."""
        from veneer.adapters import files
        from veneer.tasks.kept import kept

        found = kept(self.folders[0])
        brought = [name for folder in self.folders for name in files.read(folder).config.modules_to_save or ()]
        options = found[1].model_options() if found is not None else {}
        return {**options, "elsewhere": lambda _: brought}

    @property
    def exact(self) -> bool:
        """Whether the merged model differs by rounding to its dtype alone; layers of 8 bits round their inputs."""
        return self.into != "requantised" and self.quantisation != "int8"

    def streaming(self) -> StreamingMerge | None:
        """The merge of this checkpoint tensor by tensor; None, and a note, when it cannot go so."""
        from veneer.adapters import files
        from veneer.adapters.streaming import StreamingMerge
        from veneer.tasks.shards import shards, skeleton, weight_files

        adapters = {name: files.read(folder) for name, folder in zip(self.names, self.folders, strict=True)}
        try:
            empty = skeleton(self.model, auto_class=self.auto_class, dtype=self.dtype, **self.task_options)
            return StreamingMerge(empty, adapters, shards(empty, weight_files(self.model)))
        except NotStreamableError as error:
            warnings.warn(f"{error} The whole model is loaded instead.", stacklevel=2)
            return None

    def adapted(self) -> PeftModel:
        """The base in memory with its adapters, all active."""
        from veneer.tasks.loading import load_config, load_model

        stored = load_config(self.model).to_dict().get("quantization_config")
        quantize = None if stored else self.quantisation
        options = {"dtype": self.dtype, "quantize": quantize, **self.task_options}
        base = load_model(self.model, auto_class=self.auto_class, **options)
        adapted = with_adapters(base, self.folders, self.names)
        adapted.set_adapter(self.names, inference_mode=True)
        return adapted

    def copy_beside(self, folder: Path) -> None:
        """What else a model's folder holds: the tokenizer and how to prepare images and sound."""
        from veneer.tasks.kept import TASK_NAME
        from veneer.tasks.loading import INPUT_CONFIGS, model_folder, needs_tokenizer

        if needs_tokenizer(self.auto_class):
            _copy_tokenizer([*self.folders, Path(self.model).expanduser()], self.model, folder)
        if (self.folders[0] / TASK_NAME).is_file():
            shutil.copyfile(self.folders[0] / TASK_NAME, folder / TASK_NAME)
        for name in INPUT_CONFIGS:
            if (model_folder(self.model) / name).is_file():
                shutil.copyfile(model_folder(self.model) / name, folder / name)


@dataclass(frozen=True)
class _Expected:
    """The unmerged model's outputs, to compare the merged one's with."""

    model_class: Any
    given: dict[str, Tensor]
    outputs: Tensor
    effect: float
    """How much of the outputs is the adapters' doing."""

    @classmethod
    def of(cls, adapted: PeftModel) -> _Expected:
        from veneer.evaluate.equality import fixed_input, outputs

        base = adapted.get_base_model()
        given = fixed_input(base)
        expected = outputs(adapted, given)
        with adapted.disable_adapter():
            effect = (expected - outputs(adapted, given)).abs().max().item()
        return cls(type(base), given, expected, effect)

    def compared(self, folder: Path, precision: torch.dtype, output: Path, *, exact: bool) -> tuple[float, float]:
        """The largest difference of an output of the model in a folder, and the largest output.

        Raises:
            MergeError: the merge is to be exact, and the difference is more than rounding.
        """
        from veneer.adapters.index import ModuleIndex
        from veneer.adapters.kbit import quantised_slots, settle
        from veneer.evaluate.equality import difference, outputs

        merged = self.model_class.from_pretrained(folder, dtype=precision)
        settle(quantised_slots(ModuleIndex(merged)))
        compared = difference(self.outputs, outputs(merged, self.given), precision)
        if not exact:
            warnings.warn(
                f"Quantised numbers are rounded: the merged model's logits differ from the unmerged one's by up to "
                f"{compared.largest:.3g} of {compared.scale:.3g}, and the adapter changes them by {self.effect:.3g}.",
                stacklevel=2,
            )
            return compared.largest, compared.scale
        if not compared.equal:
            raise MergeError(
                f"The merged model's logits differ from the unmerged one's by up to {compared.largest:.3g} of "
                f"{compared.scale:.3g}, more than rounding in {_name(precision)} explains ({compared.bound:.3g}); "
                f"{str(output)!r} was not written."
            )
        if compared.largest > self.effect / 2:
            warnings.warn(
                f"In {_name(precision)}, rounding ({compared.largest:.3g}) hides half or more of what the adapter "
                f"changes ({self.effect:.3g}); merge with --dtype float32 to keep it.",
                stacklevel=2,
            )
        return compared.largest, compared.scale


def _streamed(job: _Job, streaming: StreamingMerge, output: Path, *, verify: bool, force: bool) -> MergeReport:
    from veneer.tasks.shards import save_configs

    expected = None
    if verify:
        with warnings.catch_warnings():
            # What there is to say about this model and its adapters was said when the merge was prepared.
            warnings.simplefilter("ignore")
            expected = _Expected.of(job.adapted())
        gc.collect()
    skeleton: Any = streaming.adapted.model

    def write(folder: Path) -> MergeReport:
        streaming.write(folder)
        save_configs(skeleton, folder)
        job.copy_beside(folder)
        layers = len(streaming.adapted.layers)
        return _report(job, layers, skeleton.dtype, expected, folder, output, streamed=True)

    return write_folder(output, write, replace=force)


def _in_memory(job: _Job, output: Path, *, verify: bool, force: bool) -> MergeReport:
    adapted = job.adapted()
    expected = _Expected.of(adapted) if verify else None
    layers = sum(1 for layer in adapted.base_model.layers.values() if layer.active_adapters)
    # Held in one place only, so that writing can let go of it: two copies of a large model may not fit.
    merged: list[Any] = [adapted.merge_and_unload(safe_merge=True, into=None if job.into == FULL else job.into)]
    precision = merged[0].dtype
    del adapted

    def write(folder: Path) -> MergeReport:
        try:
            merged.pop().save_pretrained(folder)
        except SafetensorError as error:
            # Its own class hides a full disk.
            raise OSError(str(error)) from error
        gc.collect()
        job.copy_beside(folder)
        return _report(job, layers, precision, expected, folder, output, streamed=False)

    return write_folder(output, write, replace=force)


def _report(
    job: _Job,
    layers: int,
    precision: torch.dtype,
    expected: _Expected | None,
    folder: Path,
    output: Path,
    *,
    streamed: bool,
) -> MergeReport:
    from veneer.train.log import peak_memory

    largest, scale = (None, None) if expected is None else expected.compared(folder, precision, output, exact=job.exact)
    memory = peak_memory()
    return MergeReport(tuple(job.names), layers, _name(precision), largest, scale, streamed, memory, job.into)


def _quantisation(model: str | Path, folders: list[Path], into: str) -> str | None:
    """How the base that is merged into is quantised: as its files say, or the run that trained the adapter.

    Raises:
        UsageError: nothing says it, or the files are quantised and ``into`` is "full".
    """
    from veneer.tasks.loading import load_config
    from veneer.train.config import read_fields

    if into not in _INTO:
        raise UsageError(f"--into is {into!r}; expected {', '.join(_INTO)}.{nearest(into, _INTO)}")
    stored = load_config(model).to_dict().get("quantization_config")
    if into == FULL:
        if stored:
            raise UsageError(
                f"The files of {str(model)!r} are quantised ({stored.get('quant_method')}); give the base in full "
                "precision as --model, or choose --into dequantised or --into requantised."
            )
        return None
    if stored:
        return "int8" if stored.get("load_in_8bit") else str(stored.get("bnb_4bit_quant_type"))
    runs = {folder: folder.parent / _RUN if (folder.parent / _RUN).is_file() else folder / _RUN for folder in folders}
    kinds = {folder: read_fields(run).get("quantize") if run.is_file() else None for folder, run in runs.items()}
    for folder, kind in kinds.items():
        if kind is None:
            raise UsageError(
                f"--into {into} is for an adapter that was trained on a quantised base, and nothing says that "
                f"{str(folder)!r} was: there is no {_RUN} with quantize beside it. Leave --into at {FULL}."
            )
    if len(set(kinds.values())) > 1:
        raise UsageError(f"These adapters were trained on bases of {' and '.join(sorted(set(kinds.values())))}.")
    return str(kinds[folders[0]])


def _check_output(output: Path, given: list[Path], *, force: bool) -> None:
    """Refuse an output that exists, unless it may be replaced.

    Raises:
        UsageError: it exists and ``force`` is not given, or it is no model's folder, or it holds what is merged.
    """
    if not output.exists():
        return
    if not force:
        raise UsageError(f"The output {str(output)!r} exists already; name another folder, or use --force.")
    inside = [path for path in given if path.exists() and path.resolve().is_relative_to(output.resolve())]
    if inside:
        raise UsageError(f"The output {str(output)!r} holds {str(inside[0])!r}, which is to be merged; name another.")
    if not (output / _CONFIG).is_file():
        raise UsageError(f"The output {str(output)!r} is no model's folder, so --force leaves it; name another.")


def _fits(streaming: StreamingMerge) -> bool:
    """Whether free memory holds the model twice: once for itself, once for all that running it takes."""
    from veneer.cli.env import memory

    available = memory()["available"]
    model = streaming.adapted.model
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if available is None or 2 * size <= available:
        return True
    warnings.warn(
        f"Not verified: the model has {size / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are free; "
        "--verify compares the outputs all the same.",
        stacklevel=2,
    )
    return False


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
