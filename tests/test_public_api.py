"""The public names, frozen, and what importing them costs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import veneer
from veneer.core.absent import ABSENT

FROZEN = [
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
HEAVY = (
    "transformers",
    "accelerate",
    "datasets",
    "matplotlib",
    "pydantic",
    "peft",
    "typer",
    "rich",
    "huggingface_hub",
    "bitsandbytes",
)


def test_public_names() -> None:
    assert veneer.__all__ == FROZEN == sorted(FROZEN)
    for name in FROZEN:
        assert getattr(veneer, name).__name__ == name
    assert dir(veneer) == FROZEN


def test_unknown_name() -> None:
    assert not hasattr(veneer, "LoraConfg")


def test_errors_have_one_root_and_an_exit_code() -> None:
    for name in FROZEN:
        found = getattr(veneer, name)
        if name.endswith("Error"):
            assert issubclass(found, veneer.VeneerError)
            assert found.exit_code == (2 if issubclass(found, veneer.UsageError | veneer.ConfigError) else 1)
    assert issubclass(veneer.BaseMismatchWarning, UserWarning)


def test_importing_every_name_imports_no_heavy_package() -> None:
    script = (
        "import sys, veneer\n"
        "for name in veneer.__all__: getattr(veneer, name)\n"
        f"print(*[package for package in {HEAVY} if package in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_adapting_saving_and_loading_a_torch_model_needs_no_model_library() -> None:
    script = (
        "import sys, tempfile, torch, veneer\n"
        "make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Embedding(3, 4))\n"
        "model = veneer.get_peft_model(make(), veneer.LoraConfig(r=1, target_modules=['0', '1']))\n"
        "folder = tempfile.mkdtemp()\n"
        "model.save_pretrained(folder)\n"
        "veneer.PeftModel.from_pretrained(make(), folder).merge_and_unload()\n"
        "print(*[p for p in ('transformers', 'accelerate', 'peft', 'datasets') if p in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_of_peft_is_served_or_says_why_not() -> None:
    import peft

    for name in peft.__all__:
        assert (name in veneer.__all__) != (name in ABSENT), name
    assert set(ABSENT) <= set(peft.__all__)
    for name, reason in ABSENT.items():
        with pytest.raises(AttributeError, match=f"PEFT's {name} is not offered: {re.escape(reason)}"):
            getattr(veneer, name)
