"""Loading with the weights in a few bits, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import chat
from veneer.core.errors import UsageError
from veneer.tasks.loading import load_model

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat.saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(tiny: Path, kind: str, dtype: str) -> None:
    model = load_model(tiny, quantize=kind, dtype=dtype)
    own = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    layer: Any = model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit"
    assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == (kind, True)
    assert layer.compute_dtype == own
    assert type(model.lm_head) is nn.Linear
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == own


def test_eight_bits(tiny: Path) -> None:
    model = load_model(tiny, quantize="int8")
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear8bitLt"
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    assert type(model.lm_head) is nn.Linear


def mapped(folder: Path) -> bool:
    return any(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_weight_file_is_let_go(tmp_path: Path, kind: str) -> None:
    folder = chat.saved(tmp_path / "tiny", tied=True)
    plain = load_model(folder)
    assert mapped(folder)
    del plain
    model = load_model(folder, quantize=kind)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not mapped(folder)


def test_a_folder_that_is_quantised_loads_so_and_not_twice(tiny: Path, tmp_path: Path) -> None:
    load_model(tiny, quantize="nf4").save_pretrained(tmp_path / "stored")
    assert type(load_model(tmp_path / "stored").model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with pytest.raises(UsageError, match=r"files are quantised already \(bitsandbytes\); leave quantize=fp4 out"):
        load_model(tmp_path / "stored", quantize="fp4")


def test_an_unknown_kind_names_the_nearest(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"quantize is 'nf5'; expected one of nf4, fp4, int8. Did you mean 'nf4'"):
        load_model(tiny, quantize="nf5")


def test_without_bitsandbytes_it_says_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(UsageError, match=r"which is not installed: pip install 'veneer\[quant\]'"):
        load_model(tiny, quantize="nf4")
