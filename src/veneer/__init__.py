"""veneer: low-rank adaptation of any torch model, with PEFT's names and files.

Each name is imported when it is first used, so that ``veneer -h`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.adapters.budget_callback import AdaLoraCallback
    from veneer.adapters.corda import preprocess_corda
    from veneer.adapters.eva import get_eva_state_dict, initialize_lora_eva_weights
    from veneer.adapters.kbit import prepare_model_for_kbit_training
    from veneer.adapters.loftq import replace_lora_weights_loftq
    from veneer.adapters.lora_ga import preprocess_loraga
    from veneer.adapters.model import PeftModel, get_peft_model
    from veneer.core.adalora_config import AdaLoraConfig
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
    from veneer.core.start_config import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
    from veneer.core.task_type import TaskType
    from veneer.core.vera_config import VeraConfig

__all__ = [
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdapterFileError",
    "BaseMismatchWarning",
    "ConfigError",
    "CordaConfig",
    "DataError",
    "DiskError",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "MergeError",
    "PeftConfig",
    "PeftModel",
    "TargetError",
    "TaskType",
    "TrainingError",
    "UsageError",
    "VeneerError",
    "VeraConfig",
    "get_eva_state_dict",
    "get_peft_model",
    "initialize_lora_eva_weights",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
]

_HOMES = {
    "AdaLoraCallback": "veneer.adapters.budget_callback",
    "AdaLoraConfig": "veneer.core.adalora_config",
    "CordaConfig": "veneer.core.start_config",
    "EvaConfig": "veneer.core.start_config",
    "LoftQConfig": "veneer.core.start_config",
    "LoraConfig": "veneer.core.config",
    "LoraGAConfig": "veneer.core.start_config",
    "PeftConfig": "veneer.core.config",
    "PeftModel": "veneer.adapters.model",
    "TaskType": "veneer.core.task_type",
    "VeraConfig": "veneer.core.vera_config",
    "get_eva_state_dict": "veneer.adapters.eva",
    "get_peft_model": "veneer.adapters.model",
    "initialize_lora_eva_weights": "veneer.adapters.eva",
    "prepare_model_for_kbit_training": "veneer.adapters.kbit",
    "preprocess_corda": "veneer.adapters.corda",
    "preprocess_loraga": "veneer.adapters.lora_ga",
    "replace_lora_weights_loftq": "veneer.adapters.loftq",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "veneer.core.errors")), name)


def __dir__() -> list[str]:
    return [*__all__]
