from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tests import chat
from veneer.adapters.model import get_peft_model
from veneer.core.config import LoraConfig
from veneer.core.errors import DiskError
from veneer.train import checkpoint

FULL = OSError(errno.ENOSPC, "No space left on device")


def whole() -> Any:
    return chat.model()


def adapted() -> Any:
    return get_peft_model(chat.model(), LoraConfig(r=2))


@pytest.mark.parametrize("make", [whole, adapted])
@pytest.mark.parametrize("failure", [FULL, SafetensorError("I/O error: No space left on device"), DiskError("no")])
def test_a_full_disk_keeps_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, failure: Exception
) -> None:
    model, tokenizer = make(), chat.tokenizer()
    checkpoint.save(model, tokenizer, tmp_path / "best", figures={}, task="{}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(DiskError, match="What was there before is unchanged"):
        checkpoint.save(model, tokenizer, tmp_path / "best", figures={}, task="{}")
    assert {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_newer_one_replaces_the_whole_folder(tmp_path: Path) -> None:
    model = whole()
    checkpoint.save(model, chat.tokenizer(), tmp_path / "best", figures={}, task="{}")
    (tmp_path / "best/stale.txt").write_text("x")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    checkpoint.save(model, chat.tokenizer(), tmp_path / "best", figures={}, task="{}")
    assert not (tmp_path / "best/stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
