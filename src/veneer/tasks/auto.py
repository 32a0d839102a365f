"""A base model and an adapter on it from the adapter's folder alone, under PEFT's names."""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from veneer.core.errors import UsageError

if TYPE_CHECKING:
    from veneer.adapters.model import PeftModel
    from veneer.core.config import PeftConfig


class _Auto(ABC):
    """What all these names share. Abstract."""

    auto_class: ClassVar[str | None]
    """The transformers class that loads the base model; None takes the one that the adapter's task needs."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter was made for, and the adapter onto it.

        >>> model = AutoPeftModelForCausalLM.from_pretrained("path/to/adapter")

        Label names that veneer kept beside the adapter give the head its size. A tokenizer beside it that has more
        tokens than the base model has embeddings lets these grow first.

        Args:
            pretrained_model_name_or_path: an adapter folder, or a hub name when online.
            adapter_name: the name to give it.
            is_trainable: whether its parameters learn.
            config: used instead of the folder's own.
            revision: of the adapter, on the hub.
            kwargs: ``subfolder``, ``token``, ``cache_dir`` and ``local_files_only`` say where the adapter is; others
                go to the base model, e.g. ``dtype`` and ``device_map``.

        Raises:
            UsageError: no such adapter, or one that does not say which base model or class it needs.
        """
        from veneer.adapters.model import PeftModel
        from veneer.core.config import PeftConfig
        from veneer.core.hub import WHERE
        from veneer.tasks.loading import load_model, load_tokenizer

        where = {key: kwargs.pop(key) for key in WHERE if key in kwargs}
        if revision is not None:
            where["revision"] = revision
        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **where)
        base = config.base_model_name_or_path
        if not base:
            raise UsageError(
                f"The adapter {str(pretrained_model_name_or_path)!r} does not say which base model it is for; load "
                "that model and use PeftModel.from_pretrained."
            )
        kwargs["dtype"] = str(kwargs.pop("torch_dtype", kwargs.get("dtype", "auto"))).removeprefix("torch.")
        if config.revision is not None:
            kwargs["revision"] = config.revision
        folder = Path(pretrained_model_name_or_path) / (where.get("subfolder") or "")
        options = {**_task_options(folder), **kwargs}
        brought = getattr(config, "modules_to_save", None) or ()
        auto_class = cls.auto_class or _class_for(config, base)
        model = load_model(base, auto_class=auto_class, elsewhere=lambda _: brought, **options)
        if (folder / "tokenizer_config.json").is_file():
            tokens = len(load_tokenizer(folder))
            if tokens > len(model.get_input_embeddings().weight):  # type: ignore[arg-type]
                model.resize_token_embeddings(tokens)
        return PeftModel.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable, config, **where
        )


def _task_options(folder: Path) -> dict[str, Any]:
    """What the task that weights were trained for asks of the model."""
    from veneer.tasks.kept import kept

    found = kept(folder)
    return found[1].model_options() if found is not None else {}


def _class_for(config: PeftConfig, base: str) -> str:
    """The transformers class of a base model: that of the task, or the one that the adapter was made on."""
    from veneer.core.task_type import TaskType
    from veneer.tasks.loading import AUTO_CLASSES

    found = None if config.task_type is None else AUTO_CLASSES.get(TaskType(config.task_type))
    mapping = config.auto_mapping or {}
    if found is None and str(mapping.get("parent_library", "")).split(".")[0] == "transformers":
        found = mapping.get("base_model_class")
    if found is None:
        raise UsageError(
            f"The adapter for {base!r} says neither its task nor a class of transformers; use one of the other "
            "AutoPeftModelFor... classes, or load the model and use PeftModel.from_pretrained."
        )
    return found


@final
class AutoPeftModel(_Auto):
    """An adapted model of the class that its adapter's task needs."""

    auto_class = None


@final
class AutoPeftModelForCausalLM(_Auto):
    """An adapted language model."""

    auto_class = "AutoModelForCausalLM"


@final
class AutoPeftModelForFeatureExtraction(_Auto):
    """An adapted model of embeddings."""

    auto_class = "AutoModel"


@final
class AutoPeftModelForQuestionAnswering(_Auto):
    """An adapted model that finds answers in a text."""

    auto_class = "AutoModelForQuestionAnswering"


@final
class AutoPeftModelForSeq2SeqLM(_Auto):
    """An adapted encoder-decoder model."""

    auto_class = "AutoModelForSeq2SeqLM"


@final
class AutoPeftModelForSequenceClassification(_Auto):
    """An adapted classifier of texts."""

    auto_class = "AutoModelForSequenceClassification"


@final
class AutoPeftModelForTokenClassification(_Auto):
    """An adapted classifier of tokens."""

    auto_class = "AutoModelForTokenClassification"
