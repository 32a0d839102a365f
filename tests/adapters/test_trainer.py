"""A PeftModel trains inside transformers' Trainer as it is, with PEFT installed and without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("trainer_run.py")


@pytest.fixture(scope="module", params=["with-peft", "hide-peft"])
def outcome(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), request.param],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_learns_and_evaluates(outcome):
    losses = [entry["eval_loss"] for entry in outcome["log"] if "eval_loss" in entry]
    assert losses[1] < losses[0]


def test_checkpoints_hold_the_adapter_alone(outcome):
    """The base model's weights are nowhere; without PEFT the Trainer needs the adapter under a second name."""
    weights = {name for name in outcome["checkpoint"] if name.endswith((".safetensors", ".bin"))} - {
        "training_args.bin"
    }
    alone = {"adapter_model.safetensors"}
    assert weights == (alone if outcome["peft"] else alone | {"model.safetensors"})
    assert "adapter_config.json" in outcome["checkpoint"]
    assert outcome["final"] == ["README.md", "adapter_config.json", "adapter_model.safetensors", "training_args.bin"]


def test_what_save_model_wrote_reloads_with_equal_logits(outcome):
    assert outcome["same_reloaded"]


def test_resuming_gives_the_same_weights_as_not_stopping(outcome):
    assert outcome["same_resumed"]


def test_the_best_checkpoint_is_loaded_at_the_end(outcome):
    assert outcome["same_best"]
