"""veneer: low-rank adaptation of any torch model, with PEFT's names and files.

Each name is imported when it is first used, so that ``veneer -h`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.adapters.budget_callback import AdaLoraCallback
    from veneer.adapters.convert import (
        convert_to_lora,
        save_as_lora,
    )
    from veneer.adapters.corda import preprocess_corda
    from veneer.adapters.eva import get_eva_state_dict, initialize_lora_eva_weights
    from veneer.adapters.hotswap import (
        hotswap_adapter,
        prepare_model_for_compiled_hotswap,
    )
    from veneer.adapters.injected import (
        cast_mixed_precision_params,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        set_peft_model_state_dict,
    )
    from veneer.adapters.kbit import prepare_model_for_kbit_training
    from veneer.adapters.kinds import (
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from veneer.adapters.lifecycle import (
        rescale_adapter_scale,
    )
    from veneer.adapters.loftq import replace_lora_weights_loftq
    from veneer.adapters.lora_ga import preprocess_loraga
    from veneer.adapters.model import PeftModel, get_peft_model
    from veneer.adapters.status import get_layer_status, get_model_status
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
    from veneer.core.peft_type import (
        PeftType,
        get_peft_config,
    )
    from veneer.core.start_config import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
    from veneer.core.task_type import TaskType
    from veneer.core.vera_config import VeraConfig
    from veneer.engine.accelerate import accelerated, restored
    from veneer.tasks.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )

__all__ = [
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdapterFileError",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
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
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TargetError",
    "TaskType",
    "TrainingError",
    "UsageError",
    "VeneerError",
    "VeraConfig",
    "accelerated",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "restored",
    "save_as_lora",
    "set_peft_model_state_dict",
]

_HOMES = {
    "AdaLoraCallback": "veneer.adapters.budget_callback",
    "AdaLoraConfig": "veneer.core.adalora_config",
    "AutoPeftModel": "veneer.tasks.auto",
    "AutoPeftModelForCausalLM": "veneer.tasks.auto",
    "AutoPeftModelForFeatureExtraction": "veneer.tasks.auto",
    "AutoPeftModelForQuestionAnswering": "veneer.tasks.auto",
    "AutoPeftModelForSeq2SeqLM": "veneer.tasks.auto",
    "AutoPeftModelForSequenceClassification": "veneer.tasks.auto",
    "AutoPeftModelForTokenClassification": "veneer.tasks.auto",
    "CordaConfig": "veneer.core.start_config",
    "EvaConfig": "veneer.core.start_config",
    "LoftQConfig": "veneer.core.start_config",
    "LoraConfig": "veneer.core.config",
    "LoraGAConfig": "veneer.core.start_config",
    "PeftConfig": "veneer.core.config",
    "PeftModel": "veneer.adapters.model",
    "PeftModelForCausalLM": "veneer.adapters.kinds",
    "PeftModelForFeatureExtraction": "veneer.adapters.kinds",
    "PeftModelForQuestionAnswering": "veneer.adapters.kinds",
    "PeftModelForSeq2SeqLM": "veneer.adapters.kinds",
    "PeftModelForSequenceClassification": "veneer.adapters.kinds",
    "PeftModelForTokenClassification": "veneer.adapters.kinds",
    "PeftType": "veneer.core.peft_type",
    "TaskType": "veneer.core.task_type",
    "VeraConfig": "veneer.core.vera_config",
    "accelerated": "veneer.engine.accelerate",
    "cast_mixed_precision_params": "veneer.adapters.injected",
    "convert_to_lora": "veneer.adapters.convert",
    "get_eva_state_dict": "veneer.adapters.eva",
    "get_layer_status": "veneer.adapters.status",
    "get_model_status": "veneer.adapters.status",
    "get_peft_config": "veneer.core.peft_type",
    "get_peft_model": "veneer.adapters.model",
    "get_peft_model_state_dict": "veneer.adapters.injected",
    "hotswap_adapter": "veneer.adapters.hotswap",
    "initialize_lora_eva_weights": "veneer.adapters.eva",
    "inject_adapter_in_model": "veneer.adapters.injected",
    "load_peft_weights": "veneer.adapters.injected",
    "prepare_model_for_compiled_hotswap": "veneer.adapters.hotswap",
    "prepare_model_for_kbit_training": "veneer.adapters.kbit",
    "preprocess_corda": "veneer.adapters.corda",
    "preprocess_loraga": "veneer.adapters.lora_ga",
    "replace_lora_weights_loftq": "veneer.adapters.loftq",
    "rescale_adapter_scale": "veneer.adapters.lifecycle",
    "restored": "veneer.engine.accelerate",
    "save_as_lora": "veneer.adapters.convert",
    "set_peft_model_state_dict": "veneer.adapters.injected",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        from veneer.core.absent import ABSENT

        if name in ABSENT:
            raise AttributeError(f"PEFT's {name} is not offered: {ABSENT[name]}.")
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "veneer.core.errors")), name)


def __dir__() -> list[str]:
    return [*__all__]
