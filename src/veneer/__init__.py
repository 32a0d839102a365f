"""veneer: low-rank adaptation of any torch model, with PEFT's names and files."""

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

__all__ = [
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
    "get_peft_model",
]
