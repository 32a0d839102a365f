"""veneer: low-rank adaptation of any torch model, with PEFT's names and files.

Each name is imported when it is first used, so that ``veneer -h`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.adapters.kbit import prepare_model_for_kbit_training
    from veneer.adapters.model import PeftModel, get_peft_model
    from veneer.core.config import LoraConfig, PeftConfig
    from veneer.core.errors import (
        AdapterFileError,
        BaseMismatchWarning,
        ConfigError,
        DataError,
        DiskError,
        MergeError,
        TargetError,
        TrainingError,
        UsageError,
        VeneerError,
    )
    from veneer.core.task_type import TaskType
    from veneer.variants.adalora import AdaLoraConfig
    from veneer.variants.vera import VeraConfig

__all__ = [
    "AdaLoraConfig",
    "AdapterFileError",
    "BaseMismatchWarning",
    "ConfigError",
    "DataError",
    "DiskError",
    "LoraConfig",
    "MergeError",
    "PeftConfig",
    "PeftModel",
    "TargetError",
    "TaskType",
    "TrainingError",
    "UsageError",
    "VeneerError",
    "VeraConfig",
    "get_peft_model",
    "prepare_model_for_kbit_training",
]

_HOMES = {
    "AdaLoraConfig": "veneer.variants.adalora",
    "VeraConfig": "veneer.variants.vera",
    "LoraConfig": "veneer.core.config",
    "PeftConfig": "veneer.core.config",
    "PeftModel": "veneer.adapters.model",
    "TaskType": "veneer.core.task_type",
    "get_peft_model": "veneer.adapters.model",
    "prepare_model_for_kbit_training": "veneer.adapters.kbit",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "veneer.core.errors")), name)


def __dir__() -> list[str]:
    return [*__all__]
