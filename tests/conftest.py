"""What every test gets: no network, fixed seeds, a Ctrl-C that is heard, and warnings that are errors."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What one test keeps for later runs must not be found by the next session; the fonts that matplotlib lists may be.
os.environ["MPLCONFIGDIR"] = os.environ.get("MPLCONFIGDIR") or str(Path.home() / ".cache" / "matplotlib")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="veneer-tests-")
# Set by readline in the process that starts test workers: tables are as wide as in a pipe, everywhere.
os.environ.pop("COLUMNS", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

from tests import models

# Warnings of other projects that no test here can do anything about. Everything else is an error.
THIRD_PARTY = (
    # torch's own deprecations, met inside torch.
    "ignore::DeprecationWarning:torch.*",
    "ignore::FutureWarning:torch.*",
    "ignore:Can't initialize NVML:UserWarning",
    "ignore:.*pin_memory.*no accelerator is found:UserWarning",
    # PEFT asks transformers by a name that transformers has since changed.
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    # SWIG types met when sentencepiece or similar extensions are first imported.
    "ignore:builtin type [Ss]wig.*:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    # A shell lets its background jobs ignore Ctrl-C, and so would the runs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "error")
    for line in THIRD_PARTY:
        config.addinivalue_line("filterwarnings", line)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny matrices are slower on two threads than on one, and test workers share the cores.
    torch.set_num_threads(1)


@pytest.fixture(params=models.MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of tiny model in turn."""
    return request.param


@pytest.fixture
def llama() -> torch.nn.Module:
    """A tiny causal language model with an output head of its own."""
    return models.make("llama")
