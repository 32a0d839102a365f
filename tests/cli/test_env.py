"""``veneer env``."""

from __future__ import annotations

import json

import pytest
import torch

from veneer.cli.main import main


def test_versions_device_memory_and_caches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["versions", "device", "memory", "caches"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["device"]["threads"] == torch.get_num_threads()
    assert "glibc" in facts["device"]["allocator"] or "LD_PRELOAD" in facts["device"]["allocator"]
    assert facts["device"]["matmul_auto"].startswith(("torch", "onednn"))
    assert facts["device"]["precision_auto"].startswith(("fp32, by matmuls", "bf16, by matmuls"))
    assert facts["caches"] == {**facts["caches"], "veneer": f"{tmp_path}/veneer", "hub_offline": True}
    assert main(["env"]) == 0
    assert "transformers" in capsys.readouterr().out
