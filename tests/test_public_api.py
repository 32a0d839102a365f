"""The public names, frozen, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import veneer

FROZEN = [
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
