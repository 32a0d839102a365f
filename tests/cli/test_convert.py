"""``veneer convert``: plain LoRA with the outputs of the adapter, the base read from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import chat
from tests.adapters.making import reconfigure
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.cli.main import main
from veneer.tasks.loading import load_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    chat.model().save_pretrained(folder, max_shard_size="20KB")
    chat.tokenizer().save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, **config: Any) -> Path:
    full = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(load_model(base), LoraConfig(**full))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder, tokenizer=chat.tokenizer())
    return folder


def run(adapter: Path, base: Path, output: Path, *more: str) -> int:
    return main(["convert", str(adapter), "--model", str(base), "--output", str(output), *more])


def logits(base: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(load_model(base), adapter)(input_ids=torch.tensor([[3, 4, 5, 6]])).logits


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_exactly(config: dict[str, Any], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained(base, tmp_path / "a", **config)
    assert run(adapter, base, tmp_path / "b", "--to", "lora", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["error"], document["kept"], document["notes"]) == (0, 1, [])
    torch.testing.assert_close(logits(base, tmp_path / "b"), logits(base, adapter), rtol=1e-6, atol=1e-6)
    assert (tmp_path / "b" / "tokenizer_config.json").is_file()
    assert "of type LORA" in (tmp_path / "b" / "README.md").read_text()


def test_dora_with_its_error(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained(base, tmp_path / "a", use_dora=True)
    assert run(adapter, base, tmp_path / "b") == 2
    assert "full rank of 32" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert run(adapter, base, tmp_path / "b", "--r", "32", "--json") == 0
    assert json.loads(capsys.readouterr().out)["error"] < 1e-5
    torch.testing.assert_close(logits(base, tmp_path / "b"), logits(base, adapter), rtol=1e-4, atol=1e-5)
    assert run(adapter, base, tmp_path / "c", "--energy", "0.9", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert all(layer["kept"] >= 0.9 for layer in document["layers"])
    assert 0 < document["error"] <= 0.1**0.5


def test_filling_up_is_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained(base, tmp_path / "a")
    assert run(adapter, base, tmp_path / "b", "--r", "5") == 0
    assert "4 of 4 layers had a lower rank and were filled up with zeros" in capsys.readouterr().err


@pytest.mark.filterwarnings("default:This adapter was trained on another base model")
def test_another_base_is_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained(base, tmp_path / "a")
    other = load_model(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    other.save_pretrained(tmp_path / "other")
    assert run(adapter, tmp_path / "other", tmp_path / "b") == 0
    assert "its weights differ from those of" in capsys.readouterr().err


def test_mistakes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained(base, tmp_path / "a")
    output = tmp_path / "b"
    for more, sentence in (
        (("--to", "lra"), "Did you mean 'lora'?"),
        (("--r", "2", "--energy", "0.5"), "--r and --energy are both given"),
        (("--r", "0"), "--r is 0"),
    ):
        assert run(adapter, base, output, *more) == 2
        assert sentence in capsys.readouterr().err
    assert run(adapter, tmp_path / "bse", output) == 2
    assert "Did you mean 'base'" in capsys.readouterr().err
    assert run(adapter, base, adapter) == 2
    assert "--force to replace the adapter in it" in capsys.readouterr().err
    reconfigure(adapter, target_modules=["q_proj"])
    assert run(adapter, base, output) == 1
    assert "has no place in this model" in capsys.readouterr().err
    assert not output.exists()
