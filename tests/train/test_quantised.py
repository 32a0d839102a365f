"""A run whose base is stored in a few bits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import chat
from veneer.adapters.model import PeftModel
from veneer.core.errors import ConfigError
from veneer.tasks.loading import load_model
from veneer.train.config import RunConfig
from veneer.train.loop import train

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat.saved(tmp_path_factory.mktemp("models") / "tiny")


def config(tiny: Path, folder: Path, **settings: Any) -> RunConfig:
    values: dict[str, Any] = {"batch_size": 4, "learning_rate": 5e-3, "epochs": 6, "target_modules": "all-linear"}
    return RunConfig(**{"model": str(tiny), "output": str(folder), **values, **settings})


@pytest.mark.parametrize("checkpointing", ["off", "1"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_run_learns_and_says_what_its_base_was(tiny: Path, tmp_path: Path, kind: str, checkpointing: str) -> None:
    settings = config(tiny, tmp_path / "run", quantize=kind, checkpoint=checkpointing)
    result = train(settings, train_rows=chat.pairs(12))
    record = result.record
    assert record.held_out_after["loss"] < record.held_out_before["loss"]
    assert record.quantize == kind == json.loads((tmp_path / "run" / "result.json").read_text())["quantize"]
    assert RunConfig.read(tmp_path / "run" / "run.yaml").quantize == kind
    (note,) = (note for note in record.notes if "quantised" in note)
    assert re.fullmatch(r"14 layers of the base are quantised and take \d\.\d{3} bytes a weight\.", note)
    # The base is the one that the files hold: the adapter on a fresh copy of it is the trained model.
    ids = torch.arange(3, 13)[None]
    again = PeftModel.from_pretrained(load_model(tiny, quantize=kind), tmp_path / "run" / "last")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits)
        # And it works on the base in full precision, which is what merging is done into.
        full = PeftModel.from_pretrained(load_model(tiny), tmp_path / "run" / "last")
        assert full(input_ids=ids).logits.isfinite().all()


def test_in_bfloat16_the_base_computes_in_it_and_the_adapter_learns_in_float32(tiny: Path, tmp_path: Path) -> None:
    result = train(config(tiny, tmp_path / "run", quantize="nf4", precision="bf16"), train_rows=chat.pairs(12))
    assert result.record.held_out_after["loss"] < result.record.held_out_before["loss"]
    assert result.model.get_base_model().model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}


def test_without_it_the_base_is_in_full_precision(tiny: Path, tmp_path: Path) -> None:
    result = train(config(tiny, tmp_path / "run", max_steps=1), train_rows=chat.pairs(12))
    assert result.record.quantize is None
    assert not any("quantised" in note for note in result.record.notes)


@pytest.mark.parametrize("method", ["full", "head"])
def test_other_methods_are_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=f"quantize=nf4 has no meaning with method={method}"):
        RunConfig(output="x", method=method, quantize="nf4")


def test_a_loaded_model_cannot_be_quantised_by_the_run(tmp_path: Path) -> None:
    settings = config(tmp_path, tmp_path / "run", quantize="nf4")
    with pytest.raises(ConfigError, match="has no effect on a model that is loaded already"):
        train(settings, model=chat.model(), tokenizer=chat.tokenizer(), train_rows=chat.pairs(12))
    assert not (tmp_path / "run").exists()
