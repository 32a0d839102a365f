"""A user's own Python file that says what a model is and how it learns, for a task that nobody thought of.

The file is run because its user names it, as ``python my_task.py`` would run it; a path that stands beside weights is
never run. What it defines:

- ``load_model(name) -> nn.Module``: the model; ``name`` is the run's ``model``, and may be anything;
- ``collate(examples: list[dict], processor) -> dict[str, Tensor]``: some examples as a batch;
- ``loss(model, batch) -> Tensor``: one loss for each example of a batch, (B,), with a graph behind it;

and, where it wants to:

- ``load_processor(name)``: whatever turns rows into examples; without it, None;
- ``encode(row: dict, processor) -> dict``: a row as an example, in what JSON can hold; without it, the row itself. Rows
  that are only to be predicted may lack what is to be learned;
- ``predict(model, batch) -> list[dict]``: what the model says of each example, in what JSON can hold;
- ``METRICS: dict[str, "min" | "max"]`` and ``metrics(predictions, examples) -> dict[str, float]``: figures of a whole
  held-out set, from what ``predict`` and ``encode`` gave;
- ``TARGET_MODULES``: the modules that are adapted when a run names none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, final

from torch import nn

from veneer.core.config import TunerConfig
from veneer.core.errors import CodeError, ConfigError, UsageError, VeneerError, nearest

REQUIRED = ("load_model", "collate", "loss")
OPTIONAL = ("load_processor", "encode", "predict", "metrics")


@final
class Program:
    """A file that was run, and its functions.

    Args:
        path: of the file.

    Raises:
        UsageError: no such file.
        CodeError: it fails, or lacks a function.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()
        if not self.path.is_file():
            beside = [file.name for file in self.path.parent.glob("*.py")]
            raise UsageError(f"There is no code file {str(path)!r}.{nearest(self.path.name, beside)}")
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.module = self._run()
        self._check()

    def __reduce__(self) -> tuple[type[Program], tuple[Path]]:
        """Other processes run the file themselves."""
        return Program, (self.path,)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """From each metric to whether it is to be small or large."""
        found: Mapping[str, Any] = getattr(self.module, "METRICS", {})
        return found

    def has(self, name: str) -> bool:
        """Whether the file defines it."""
        return hasattr(self.module, name)

    def call(self, name: str, *given: Any, about: str = "") -> Any:
        """What one of the functions gives.

        Raises:
            CodeError: it fails; the line is named, and its own error is chained.
        """
        try:
            return getattr(self.module, name)(*given)
        except VeneerError:
            raise
        except Exception as error:
            raise CodeError(f"{self._place(error, name)} failed{about}: {_said(error)}.") from error

    def expected(self, name: str, given: Any, expected: str, about: str = "") -> CodeError:
        """An error for what a function gave."""
        return CodeError(f"{name} in {self.path.name} gave {_kind(given)}{about}; expected {expected}.")

    def processor(self, name: str) -> Any:
        """What turns rows into examples."""
        return self.call("load_processor", name) if self.has("load_processor") else None

    def model(self, name: str, *, dtype: str, quantize: str | None) -> nn.Module:
        """The model.

        Raises:
            ConfigError: it is to be of another precision than the file gives it.
        """
        if dtype not in ("float32", "auto") or quantize is not None:
            asked = f"quantize={quantize}" if quantize is not None else f"dtype {dtype}"
            raise ConfigError(f"{asked} has no meaning here: load_model in {self.path.name} gives the model as it is.")
        found = self.call("load_model", name)
        if not isinstance(found, nn.Module):
            raise self.expected("load_model", found, "a torch module")
        return found

    def adapter(self, config: TunerConfig, base: str | None) -> TunerConfig:
        """An adapter's config with the file's own target modules where it names none, and the name of its base."""
        targets = config.target_modules if config.target_modules is not None else self._targets()
        return dataclasses.replace(config, target_modules=targets, base_model_name_or_path=base)

    def _targets(self) -> Any:
        return getattr(self.module, "TARGET_MODULES", None)

    def _run(self) -> ModuleType:
        name = f"veneer_code_{self.sha256[:16]}"
        spec = importlib.util.spec_from_file_location(name, self.path)
        if spec is None or spec.loader is None:
            raise UsageError(f"{str(self.path)!r} is no Python file; expected one that ends in .py.")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up while they are made.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise CodeError(f"{self._place(error, 'the code')} could not be run: {_said(error)}.") from error
        return module

    def _check(self) -> None:
        own = [name for name, value in vars(self.module).items() if callable(value) and not name.startswith("_")]
        for name in (*REQUIRED, *OPTIONAL):
            if name in REQUIRED and name not in own:
                raise CodeError(f"{self.path.name} has no function {name}.{nearest(name, own, most=1)}")
            if self.has(name) and name not in own:
                raise CodeError(
                    f"{name} in {self.path.name} is {_kind(getattr(self.module, name))}; expected a function."
                )
        needs = {"METRICS": ("metrics", "predict"), "metrics": ("METRICS",)}
        for name, others in needs.items():
            missing = [other for other in others if not self.has(other)]
            if self.has(name) and missing:
                raise CodeError(f"{self.path.name} has {name}, but no {missing[0]}; expected both.")
        if not isinstance(self.metrics, Mapping) or not all(goal in ("min", "max") for goal in self.metrics.values()):
            raise CodeError(f"METRICS in {self.path.name} is {self.metrics!r}; expected names with min or max.")

    def _place(self, error: BaseException, name: str) -> str:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(self.path)]
        return f"{name} in {self.path.name}" + (f", line {lines[-1]}," if lines else "")


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}".rstrip(".")


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")
