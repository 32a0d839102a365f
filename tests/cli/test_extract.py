"""``veneer extract``: what it writes gives the fine-tune back, and what it cannot hold is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import chat, models
from veneer import PeftModel
from veneer.cli.main import main
from veneer.tasks.loading import load_model


def moved(model: Any, *, only: str = "proj") -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return chat.saved(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path: Path, base: Path) -> Path:
    moved(load_model(base)).save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    chat.tokenizer().save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def run(base: Path, tuned: Path, output: Path, *more: str) -> int:
    return main(["extract", "--base", str(base), "--tuned", str(tuned), "--output", str(output), *more])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits


def test_a_full_rank_gives_the_fine_tune_back(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, tuned, tmp_path / "out", "--r", "32", "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["unchanged"], document["left_out"]) == ([], [])
    assert document["error"] < 1e-6
    assert "100.00 %" in err
    adapter = PeftModel.from_pretrained(load_model(base), tmp_path / "out")
    torch.testing.assert_close(logits(adapter), logits(load_model(tuned)), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(base))
    # The fine-tune's tokenizer, and so its template.
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert f"what changed from {base} to {tuned}" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_left_out_is_told(base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved(load_model(tuned), only="norm").save_pretrained(tuned)
    more = ("--energy", "0.9", "--target-modules", "q_proj,v_proj,o_proj", "--exclude-modules", "o_proj")
    assert run(base, tuned, tmp_path / "out", *more) == 0
    out, err = capsys.readouterr()
    assert "model.layers.*.mlp.gate_proj.weight" in out
    assert "model.layers.*.input_layernorm.weight" in out
    assert "15 tensors differ" in err
    assert "--modules-to-save" in err


def test_modules_kept_whole(base: Path, tuned: Path, tmp_path: Path) -> None:
    moved(load_model(tuned), only="lm_head").save_pretrained(tuned)
    assert run(base, tuned, tmp_path / "out", "--r", "32", "--modules-to-save", "lm_head") == 0
    adapter = PeftModel.from_pretrained(load_model(base), tmp_path / "out")
    torch.testing.assert_close(logits(adapter), logits(load_model(tuned)), rtol=1e-4, atol=1e-5)


def test_a_classifier(tmp_path: Path) -> None:
    models.make("bert").save_pretrained(tmp_path / "base")
    moved(models.make("bert"), only="e").save_pretrained(tmp_path / "tuned")
    assert run(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", "--r", "2") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "Neither --r nor --energy is given"),
        (["--r", "2", "--energy", "0.5"], "--r and --energy are both given"),
        (["--r", "2", "--target-modules", "q_porj"], "Did you mean 'q_proj'"),
    ],
)
def test_flags_without_meaning(
    flags: list[str], sentence: str, base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, tuned, tmp_path / "out", *flags) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_belong_together(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.make("gpt2").save_pretrained(tmp_path / "gpt2")
    assert run(tmp_path / "gpt2", tuned, tmp_path / "out", "--r", "2") == 2
    assert "The base is a gpt2 and the fine-tune a llama" in capsys.readouterr().err
    assert run(base, base, tmp_path / "out", "--r", "2") == 2
    assert "Nothing changed in the 14 layers" in capsys.readouterr().err
    assert run(base, tmp_path / "tunde", tmp_path / "out", "--r", "2") == 2
    assert "Did you mean 'tuned'" in capsys.readouterr().err
    assert run(base, tuned, tmp_path / "base", "--r", "2", "--force") == 2
    assert "is no adapter's folder" in capsys.readouterr().err


def test_a_model_of_another_width(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=400, hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=1,
    )).save_pretrained(tmp_path / "wide")  # fmt: skip
    assert run(base, tmp_path / "wide", tmp_path / "out", "--r", "2") == 2
    assert "has shape (32, 32) in the base and (48, 48) in the tuned model" in capsys.readouterr().err


def test_files_that_are_not_safetensors(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in tuned.glob("*.safetensors*"):
        path.unlink()
    torch.save(load_model(base).state_dict(), tuned / "pytorch_model.bin")
    assert run(base, tuned, tmp_path / "out", "--r", "2") == 2
    err = capsys.readouterr().err
    assert "write it with save_pretrained" in err or "cannot be read weight by weight" in err
