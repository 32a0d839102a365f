"""``veneer inspect`` on a model without weights, and on an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import chat
from veneer import LoraConfig, get_peft_model
from veneer.cli.main import main
from veneer.tasks.loading import load_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = chat.saved(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    return folder


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "0..1 2 x LlamaDecoderLayer" in out
    assert "model.layers.*.self_attn.q_proj" in out
    assert "q_proj, k_proj" not in out
    assert "trainable" in out


def test_the_config_decides(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--r", "4", "--target-modules", "q_proj,up_proj", "--rank-pattern", "up_proj=2", "--lora-alpha", "16"]
    match = _json(capsys, "inspect", str(model), *flags)["match"]
    assert {(target["path"].rpartition(".")[2], target["r"]) for target in match["targets"]} == {
        ("q_proj", 4),
        ("up_proj", 2),
    }
    assert match["trainable"] == 2 * (4 * (32 + 32) + 2 * (32 + 48))


def test_the_task_decides_the_head(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "inspect", str(model), "--task", "seq_cls")
    assert found["class"] == "LlamaForSequenceClassification"
    assert found["match"]["saved"] == [["score", 64]]


def test_patterns_that_match_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--target-modules", "q_porj"]) == 2
    assert "Did you mean 'q_proj'" in capsys.readouterr().err


def test_without_default_targets(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    transformers.CTRLConfig(n_embd=32, n_head=2, n_layer=1, dff=8, architectures=["CTRLModel"]).save_pretrained(model)
    assert main(["inspect", str(model)]) == 0
    assert "no default for model type 'ctrl'" in capsys.readouterr().err
    assert main(["inspect", str(model), "--r", "2"]) == 2


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapted = get_peft_model(load_model(chat.saved(tmp_path / "base")), LoraConfig(r=2, alpha_pattern={"v_proj": 4}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "run" / "best")
    return tmp_path / "run"


def test_an_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "inspect", str(adapter))
    loaded = load_model(adapter.parent / "base")
    from veneer import PeftModel

    adapted = PeftModel.from_pretrained(loaded, adapter / "best")
    assert len(found["layers"]) == 8
    for layer in found["layers"]:
        live = adapted.base_model.layers[layer["path"]]
        A, B = live.lora_A["default"].weight, live.lora_B["default"].weight
        scaling = live.scaling["default"]
        assert layer["scaling"] == pytest.approx(scaling)
        assert layer["update_norm"] == pytest.approx((scaling * B @ A).norm().item(), rel=1e-5)
        assert layer["a_norm"] == pytest.approx(A.norm().item(), rel=1e-5)
    assert main(["inspect", str(adapter)]) == 0
    assert "model.layers.0.self_attn.q_proj" in capsys.readouterr().out


def test_an_untrained_adapter_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(chat.model(), LoraConfig()).save_pretrained(tmp_path / "fresh")
    assert main(["inspect", str(tmp_path / "fresh")]) == 0
    assert "Every update is zero" in capsys.readouterr().err


def test_flags_have_no_meaning_on_an_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter), "--r", "4"]) == 2
    assert "its config is fixed" in capsys.readouterr().err
