"""Ranks of their own: what PEFT's files make of alpha, what veneer says of it, and alphas that match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

import veneer
from tests import models
from veneer.report.tables import target_table

RANKS = {"q_proj": 4, "down_proj": 2}
FIELDS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def scalings(config: Any) -> tuple[set[float], veneer.PeftModel]:
    model = veneer.get_peft_model(models.make("llama"), config)
    return {layer.scaling["default"] for layer in model.base_model.layers.values()}, model


def test_the_same_alpha_scales_each_rank_apart_as_in_peft_and_that_is_said() -> None:
    found, model = scalings(veneer.LoraConfig(**FIELDS, rank_pattern=RANKS))
    theirs = peft.get_peft_model(models.make("llama"), peft.LoraConfig(**FIELDS, rank_pattern=RANKS))
    assert found == {m.scaling["default"] for m in theirs.modules() if hasattr(m, "lora_A")} == {2.0, 4.0, 8.0}
    note = model.match_report.scaling_note
    assert note == (
        "Ranks differ and alpha does not, so updates are scaled by 8 at r=2, by 4 at r=4, by 2 at r=8; "
        "alpha_pattern=match scales them alike."
    )
    assert any("scaled by 8" in str(cell) for cell in target_table(model.match_report).renderables[1].columns[1]._cells)


def test_matching_alphas_scale_all_alike_in_peft_too(tmp_path: Path) -> None:
    found, model = scalings(veneer.LoraConfig(**FIELDS, rank_pattern=RANKS, alpha_pattern="match"))
    assert found == {2.0}
    assert model.match_report.scaling_note is None
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.make("llama"), str(tmp_path))
    assert {m.scaling["default"] for m in theirs.modules() if hasattr(m, "lora_A")} == {2.0}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rank_pattern": RANKS, "use_rslora": True},
        {"rank_pattern": RANKS, "alpha_pattern": {"q_proj": 8}},
        {"rank_pattern": dict.fromkeys(["q_proj", "v_proj", "down_proj"], 4)},
    ],
    ids=str,
)
def test_where_the_scaling_is_chosen_nothing_is_said(more: dict[str, Any]) -> None:
    assert scalings(veneer.LoraConfig(**FIELDS, **more))[1].match_report.scaling_note is None
