"""What is evaluated: a model, with an adapter or without, and the task that it was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.adapters.model import PeftModel
from veneer.core.config import PeftConfig
from veneer.core.errors import UsageError
from veneer.data.columns import parsed, renamed
from veneer.data.rows import Row
from veneer.data.sources import Source
from veneer.tasks.kept import task_for
from veneer.tasks.limits import longest_input
from veneer.tasks.loading import adapter_folder, processor_for
from veneer.tasks.task import AbstractTask
from veneer.train.sets import Asked, Part


@dataclass(frozen=True)
class Subject:
    """A model that is ready to be asked."""

    model: Any
    """In evaluation mode."""
    processor: Any
    """Its tokenizer, or what reads its images or sound."""
    task: AbstractTask
    task_name: str
    base: str
    """The base model's folder or name."""
    adapter: Path | None
    """The adapter's folder."""

    @classmethod
    def load(
        cls,
        model: str | None,
        adapter: str | Path | None,
        *,
        task: str | None = None,
        dtype: str = "float32",
        quantize: str | None = None,
        code: str | None = None,
    ) -> Subject:
        """Load a model, its adapter, its processor, and what is known of its task.

        Args:
            model: a folder or hub name; None takes the base that the adapter names.
            adapter: a run or adapter folder.
            task: the kind of task; None goes by what stands beside the weights.
            dtype: the precision to compute in.
            quantize: how to store the base's linear layers.
            code: the user's own file, of task other.

        Raises:
            UsageError: neither of the two is given, or something is not there, or was trained for another task.
        """
        if model is None and adapter is None:
            raise UsageError("Give --model, --adapter, or both.")
        folder = adapter_folder(adapter) if adapter is not None else None
        config = PeftConfig.from_pretrained(folder) if folder is not None else None
        base = model if model is not None else _base_of(config, folder)
        name, found = task_for(task, folder, base, code)
        brought = getattr(config, "modules_to_save", None) or ()
        loaded: Any = found.model(base, dtype=dtype, quantize=quantize, brought=brought)
        processor = processor_for(base, folder, found.auto_class) if found.pretrained else found.processor(base)
        if folder is not None:
            loaded = PeftModel.from_pretrained(loaded, folder)
        loaded.eval()
        return cls(loaded, processor, found, name, base, folder)

    @property
    def config(self) -> Any:
        """The model's; None where it has none."""
        return getattr(self.model, "config", None)

    def most(self, max_length: int) -> int:
        """The most tokens of an example: as many as are asked for, or as the model takes."""
        return min(max_length, longest_input(self.config) or max_length)

    def rows(self, read: Sequence[Row], columns: str | None) -> list[Row]:
        """Rows with their columns under the names that the task understands.

        Raises:
            ConfigError: ``columns`` names what the task does not know.
            DataError: a row does not have a column that is named.
        """
        names = parsed(columns, self.task.columns) if columns is not None else {}
        return [renamed(row, names) if names else row for row in read]

    def asked(self, found: Sequence[Source], columns: str | None) -> Asked:
        """Data for it, with its columns under the names that the task understands.

        Raises:
            ConfigError: ``columns`` names what the task does not know.
        """
        names = parsed(columns, self.task.columns) if columns is not None else {}
        return Asked([Part("", None, list(found))], [], [], names)


def _base_of(config: PeftConfig | None, folder: Path | None) -> str:
    base = config.base_model_name_or_path if config is not None else None
    if base is None:
        raise UsageError(f"The adapter {str(folder)!r} does not say what its base is; give it as --model.")
    return base
