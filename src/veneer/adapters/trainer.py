"""What transformers, and its Trainer above all, look at in a model, so that ours trains there unchanged."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from veneer.core.config import PeftConfig
from veneer.core.hub import WEIGHTS_NAME


def apparent_class(model: nn.Module) -> type:
    """The class that an adapted model passes for in ``isinstance``.

    The Trainer saves and resumes adapters alone for ``peft.PeftModel`` once that package is imported, and
    otherwise calls ``save_pretrained`` of whatever is a transformers model.
    """
    found: type = getattr(sys.modules.get("peft"), "PeftModel", None) or type(model)
    return found


@functools.cache
def forward_like(cls: type[nn.Module]) -> Callable[..., Any]:
    """A forward method with the signature of a class's: the Trainer drops every data column that is not in it."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._modules["base_model"](*args, **kwargs)  # type: ignore[misc]

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__
    return forward


def with_base(config: PeftConfig, model: nn.Module, revision: str | None) -> PeftConfig:
    """A copy of the config that knows its base model."""
    name = getattr(getattr(model, "config", None), "name_or_path", None) or getattr(model, "name_or_path", None)
    mapping = config.auto_mapping
    if config.task_type is None and mapping is None:
        mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return replace(
        config,
        base_model_name_or_path=str(name) if name else config.base_model_name_or_path,
        revision=revision or config.revision,
        auto_mapping=mapping,
    )


def leave_for_trainer(folder: Path) -> None:
    """Without PEFT installed, transformers' Trainer looks in its checkpoints for ``model.safetensors`` alone."""
    if not re.fullmatch(r"checkpoint-\d+", folder.name) or not (folder / WEIGHTS_NAME).is_file():
        return
    if importlib.util.find_spec("peft") is None:
        twin = folder / "model.safetensors"
        twin.unlink(missing_ok=True)
        try:
            os.link(folder / WEIGHTS_NAME, twin)
        except OSError:
            shutil.copyfile(folder / WEIGHTS_NAME, twin)
