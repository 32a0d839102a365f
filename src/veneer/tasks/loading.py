"""Base models, tokenizers and run folders by name: local folders first, the hub only when it is online.

Code that comes with a model is never run.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.core.errors import UsageError, listed, nearest
from veneer.core.hub import CONFIG_NAME as ADAPTER_CONFIG
from veneer.core.task_type import TaskType
from veneer.tasks.quantise import leave_file, quantisation_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""The precisions that a model can be loaded in; "auto" keeps the one that it was saved in."""
INPUT_CONFIGS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""How a model wants images and sound prepared."""
KEPT = ("best", "last")
"""The adapters that a run folder keeps, the one to use first."""

AUTO_CLASSES: dict[TaskType, str] = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.TRANSLATION: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.MULTIPLE_CHOICE: "AutoModelForMultipleChoice",
    TaskType.QUESTION_ANSWERING: "AutoModelForQuestionAnswering",
    TaskType.SPEECH_SEQ_2_SEQ: "AutoModelForSpeechSeq2Seq",
    TaskType.IMAGE_CLASSIFICATION: "AutoModelForImageClassification",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
    TaskType.OTHER: "AutoModel",
}
"""The transformers class that gives a model the head of its task."""

_MODEL_CONFIG = "config.json"
_WHOLE_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")


def load_model(
    name_or_path: str | Path,
    *,
    auto_class: str = "AutoModelForCausalLM",
    dtype: str = "float32",
    quantize: str | None = None,
    elsewhere: Callable[[PreTrainedModel], Collection[str]] = lambda model: (),
    **options: Any,
) -> PreTrainedModel:
    """A pretrained model from a local folder, from the hub's cache or, when online, from the hub.

    Args:
        name_or_path: a folder that ``save_pretrained`` wrote, or a hub name such as ``someone/model``.
        auto_class: the transformers auto class that gives the task its head.
        dtype: one of ``DTYPES``.
        quantize: one of ``quantise.Quantisation``, to store the linear layers in a few bits.
        elsewhere: the ends of the names of modules whose weights an adapter brings or training makes; they need not
            be there, or be of the same size.
        options: passed on to ``from_pretrained``, e.g. ``num_labels``.

    Raises:
        UsageError: no such model, a broken one, or one that does not fit ``auto_class``.
    """
    import transformers

    from veneer.adapters.index import ModuleIndex
    from veneer.adapters.kbit import quantised_slots, settle

    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    config = load_config(name_or_path)
    if quantize is not None:
        options["quantization_config"] = quantisation_config(quantize, dtype, config)
    model_class = getattr(transformers, auto_class)
    # Mismatches are let through so that they come back in the report instead of as a table on the screen.
    given = {"dtype": dtype, "ignore_mismatched_sizes": True, **_SAFE, **options}
    with _in_one_sentence(name_or_path, f"could not be loaded with {auto_class}"), log_errors_only():
        model, report = model_class.from_pretrained(_source(name_or_path), output_loading_info=True, **given)
    if quantize is not None:
        leave_file(model)
    # Before anybody calls it: what is measured before training must be what is trained.
    settle(quantised_slots(ModuleIndex(model)))
    ends = tuple(elsewhere(model))
    for kind in ("missing_keys", "mismatched_keys"):
        report[kind] = {key for key in report[kind] if not _inside(key if isinstance(key, str) else key[0], ends)}
    if ends:
        # Where a head is exchanged, that of another task is left behind.
        report["unexpected_keys"] = set()
    _check_report(str(name_or_path), model, report, whole=auto_class in _WHOLE_MODELS, options=options)
    return model


def load_config(name_or_path: str | Path) -> PretrainedConfig:
    """The config of a model: all that its shape needs, without its weights.

    Raises:
        UsageError: no such model, or a config that cannot be read.
    """
    from transformers import AutoConfig

    source = _source(name_or_path)
    if Path(source).is_dir():
        _check_config(Path(source))
    with _in_one_sentence(name_or_path, "has no config that this transformers can read"):
        return AutoConfig.from_pretrained(source, **_SAFE)


def model_folder(name_or_path: str | Path) -> Path:
    """The folder that a model's files are in: its own, or its place in the hub's cache.

    Raises:
        UsageError: no such model, or one of the hub that is not in the cache.
    """
    source = _source(name_or_path)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, _MODEL_CONFIG)
    if not isinstance(cached, str):
        raise UsageError(f"{source!r} is not in the hub's cache; load it once, or give a folder.")
    return Path(cached).parent


def empty_model(name_or_path: str | Path, *, auto_class: str | None = None) -> PreTrainedModel:
    """A model's modules on the meta device: shapes without weights, so that any size fits into memory.

    Args:
        name_or_path: as for ``load_model``; only the config has to be there.
        auto_class: the auto class to build; None builds the architecture that the config names.

    Raises:
        UsageError: no such model, or a config that ``auto_class`` has no model for.
    """
    import torch
    import transformers

    config = load_config(name_or_path)
    wanted = auto_class
    if wanted is None:
        wanted = next((name for name in config.architectures or [] if hasattr(transformers, name)), "AutoModel")
    found = getattr(transformers, wanted)
    with _in_one_sentence(name_or_path, f"cannot be built as {wanted}"), torch.device("meta"):
        return found.from_config(config) if wanted.startswith("Auto") else found(config)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside a model, or beside an adapter that was saved with one.

    Raises:
        UsageError: no such model, or no tokenizer beside it.
    """
    from transformers import AutoTokenizer

    beside = Path(name_or_path).expanduser()
    source = str(beside) if (beside / "tokenizer_config.json").is_file() else _source(name_or_path)
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        raise UsageError(
            f"{str(name_or_path)!r} has no tokenizer files; save the tokenizer into it with save_pretrained."
        )
    with _in_one_sentence(name_or_path, "has no tokenizer that this transformers can read"):
        return AutoTokenizer.from_pretrained(source, **_SAFE)


_PROCESSORS = {
    "AutoModelForImageClassification": "AutoImageProcessor",
    "AutoModelForSpeechSeq2Seq": "AutoProcessor",
}
"""The transformers class that prepares a model's inputs, where it is no tokenizer alone."""


def load_processor(name_or_path: str | Path, auto_class: str) -> Any:
    """What prepares the inputs of a model: its tokenizer, or what reads its images or sound.

    Raises:
        UsageError: no such model, or nothing of that kind beside it.
    """
    import transformers

    kind = _PROCESSORS.get(auto_class)
    if kind is None:
        return load_tokenizer(name_or_path)
    beside = Path(name_or_path).expanduser()
    source = str(beside) if (beside / ADAPTER_CONFIG).is_file() else _source(name_or_path)
    # Pillow alone, with or without torchvision: the same pixels on every machine.
    options = {"backend": "pil"} if kind == "AutoImageProcessor" else {}
    with (
        _in_one_sentence(name_or_path, f"has no {kind.removeprefix('Auto')} that this transformers can read"),
        log_errors_only(),
    ):
        return getattr(transformers, kind).from_pretrained(source, **options, **_SAFE)


def needs_tokenizer(auto_class: str) -> bool:
    """Whether the models of a class take or give text."""
    return _PROCESSORS.get(auto_class) != "AutoImageProcessor"


def processor_for(model: str | Path, adapter: Path | None, auto_class: str) -> Any:
    """What an adapter was trained with to prepare inputs, else what stands beside the base model.

    Raises:
        UsageError: nothing beside any of them.
    """
    if auto_class not in _PROCESSORS:
        return tokenizer_for(model, [adapter] if adapter is not None else [])
    own = adapter is not None and any((adapter / name).is_file() for name in INPUT_CONFIGS)
    return load_processor(adapter if own and adapter is not None else model, auto_class)


def tokenizer_for(model: str | Path, adapters: Sequence[Path]) -> PreTrainedTokenizerBase:
    """The tokenizer that adapters were trained with, and so its chat template, else the one beside the base model.

    Several adapters are asked the same text; where their templates differ, the first one's is used and said so.

    Raises:
        UsageError: no tokenizer beside any of them.
    """
    own = [folder for folder in adapters if (folder / "tokenizer_config.json").is_file()]
    if not own:
        return load_tokenizer(model)
    tokenizer = load_tokenizer(own[0])
    for folder in own[1:]:
        if load_tokenizer(folder).chat_template != tokenizer.chat_template:
            warnings.warn(
                f"{str(folder)!r} was trained with another chat template than {str(own[0])!r}, whose template is used "
                "for all; ask it alone to see what it learned.",
                stacklevel=2,
            )
    return tokenizer


def adapter_folder(path: str | Path) -> Path:
    """The folder with ``adapter_config.json``: a run folder's best adapter, else its last; an adapter's own folder.

    Raises:
        UsageError: neither of the two; the message says what the folder is instead.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UsageError(_no_folder(folder, "a run folder or an adapter folder"))
    for candidate in (folder, *(folder / kept for kept in KEPT)):
        if (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    for candidate in (folder, *(folder / kept for kept in KEPT)):
        if (candidate / _MODEL_CONFIG).is_file():
            raise UsageError(f"{str(candidate)!r} holds a whole model, not an adapter; give it as the model.")
    inside = sorted(config.parent.name for config in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if inside:
        raise UsageError(f"{str(path)!r} holds several adapters: {listed(inside)}; name one of these folders.")
    raise UsageError(
        f"{str(path)!r} is neither a run folder nor an adapter folder: there is no {ADAPTER_CONFIG} in it, "
        f"in {KEPT[0]}/ or in {KEPT[1]}/."
    )


def _inside(key: str, ends: tuple[str, ...]) -> bool:
    """Whether a parameter lies in a module whose path ends so."""
    parts = key.split(".")
    return any(".".join(parts[:at]).endswith(ends) for at in range(1, len(parts)) if ends)


_SAFE: dict[str, Any] = {"trust_remote_code": False}


def _check_report(
    name: str, model: PreTrainedModel, report: dict[str, Any], *, whole: bool, options: dict[str, Any]
) -> None:
    """Refuse a model with random weights where trained ones belong; say which others are fresh or unused."""
    kind = type(model).__name__
    mismatched = sorted(key for key, *_ in report["mismatched_keys"])
    if mismatched and not options.get("ignore_mismatched_sizes"):
        key, saved, wanted = min(report["mismatched_keys"])
        raise UsageError(
            f"{name!r} does not fit its own config: {key} is {tuple(saved)} in the weights and {tuple(wanted)} in "
            f"{kind}; in all {len(mismatched)} differ; expected weights and config of the same model."
        )
    fresh = sorted({*report["missing_keys"], *mismatched})
    if fresh and whole:
        raise UsageError(
            f"{name!r} has no weights for {listed(fresh, most=3)}, which {kind} needs; expected a complete model."
        )
    if fresh:
        warnings.warn(f"{name!r} has no weights for {listed(fresh, most=4)}: they start at random.", stacklevel=3)
    unused = sorted(report["unexpected_keys"])
    if unused:
        warnings.warn(f"{kind} has no place for {listed(unused, most=4)} of {name!r}: not loaded.", stacklevel=3)


@contextlib.contextmanager
def log_errors_only() -> Iterator[None]:
    """The load report of transformers is told in veneer's words instead."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _source(name_or_path: str | Path) -> str:
    """What to hand to ``from_pretrained``: a folder with a model in it, or a hub name that can be reached."""
    if not str(name_or_path).strip():
        raise UsageError("The model's name is empty; expected a folder with a model in it, or a hub name.")
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if (folder / _MODEL_CONFIG).is_file():
            return str(folder)
        for kept in ("", *KEPT):
            if (folder / kept / ADAPTER_CONFIG).is_file():
                raise UsageError(
                    f"{str(name_or_path)!r} holds an adapter, not a model; give its base as the model"
                    f"{_base_of(folder / kept)} and this folder as the adapter."
                )
        raise UsageError(f"{str(name_or_path)!r} has no {_MODEL_CONFIG}; expected a folder with a model in it.")
    name = str(name_or_path)
    if folder.exists():
        raise UsageError(f"{name!r} is a file; expected a folder with a model in it, or a hub name.")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UsageError(_no_folder(folder, "a folder with a model in it"))
    if _out_of_reach(name):
        raise UsageError(
            f"{_no_folder(folder, 'a folder with a model in it')} As a hub name it is not in the cache, "
            "and HF_HUB_OFFLINE keeps the hub switched off."
        )
    return name


def _out_of_reach(name: str) -> bool:
    """Whether a hub name has no copy in the cache while the hub is switched off."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(name, _MODEL_CONFIG), str)
    except HFValidationError:
        return True


def _no_folder(folder: Path, expected: str) -> str:
    """A sentence for a folder that is not there, with those of similar names beside it."""
    beside = [f.name for f in folder.parent.iterdir() if f.is_dir()] if folder.parent.is_dir() else []
    return f"There is no folder {str(folder)!r}; expected {expected}.{nearest(folder.name, beside)}"


def _base_of(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        return f" ({base})" if base else ""
    return ""


def _check_config(folder: Path) -> None:
    path = folder / _MODEL_CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, OSError) as error:
        raise UsageError(f"{str(path)!r} is not readable as JSON: {error}.") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise UsageError(f"{str(path)!r} names no model_type; expected the config of a transformers model.")
    from transformers import CONFIG_MAPPING

    if values["model_type"] not in CONFIG_MAPPING:
        own_code = " The model brings code of its own, which is never run." if "auto_map" in values else ""
        raise UsageError(
            f"{str(path)!r} has model_type {values['model_type']!r}, which this transformers does not know."
            f"{nearest(str(values['model_type']), CONFIG_MAPPING)}{own_code}"
        )


@contextlib.contextmanager
def _in_one_sentence(name: str | Path, failure: str) -> Iterator[None]:
    """Any failure inside a library's loader becomes one sentence; the original stays chained for debugging."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        reason = reason if len(reason) <= 200 else f"{reason[:197]}..."
        raise UsageError(f"{str(name)!r} {failure}: {reason.rstrip('.')}.") from error
