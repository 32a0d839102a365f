"""Configs of plain factors: patterns that name one layer each, and what stays of the source."""

from __future__ import annotations

import re

import pytest

from tests import models
from veneer import LoraConfig
from veneer.adapters.index import ModuleIndex
from veneer.adapters.plain import names_for, numbers, pattern, plain_config

PATHS = ["model.layers.1.q_proj", "model.layers.11.q_proj", "x.model.layers.1.q_proj", "0", "inner.0", "odd[1].w"]


def reached(key: str) -> list[str]:
    return [path for path in PATHS if re.match(rf"(.*\.)?({key})$", path)]


def test_a_pattern_reaches_one_layer_each() -> None:
    found = pattern(dict.fromkeys(PATHS, 3), PATHS)
    assert [reached(key) for key in found] == [[path] for path in PATHS]
    # Plain names where these are enough.
    assert [key for key in found if key in PATHS] == ["model.layers.11.q_proj", "x.model.layers.1.q_proj", "inner.0"]


@pytest.mark.parametrize("alphas", [None, {"a": 5.0, "b": 5.0, "c": 2.5}])
def test_ranks_and_alphas_come_back(alphas: dict[str, float] | None) -> None:
    ranks = {"a": 4, "b": 4, "c": 9}
    config = plain_config(LoraConfig(target_modules=["a", "b", "c"]), ranks, alphas=alphas)
    wanted = alphas or ranks
    assert {path: numbers(config, path) for path in ranks} == {path: (ranks[path], wanted[path]) for path in ranks}
    assert config.r == 4
    assert isinstance(config.lora_alpha, int)


def test_how_it_was_trained_is_over_and_what_it_is_stays() -> None:
    source = LoraConfig(
        target_modules=["a"],
        use_rslora=True,
        use_dora=True,
        use_lorafa=True,
        init_lora_weights="gaussian",
        lora_dropout=0.2,
        task_type="CAUSAL_LM",
        trainable_token_indices=[3],
        base_model_name_or_path="base",
        exclude_modules=["b"],
    )
    config = plain_config(source, {"a": 2}, modules_to_save=["c"], lora_bias=True)
    assert (config.use_rslora, config.use_dora, config.use_lorafa, config.init_lora_weights) == (
        False,
        False,
        False,
        True,
    )
    assert (config.lora_dropout, config.task_type, config.trainable_token_indices) == (0.2, "CAUSAL_LM", [3])
    assert (config.base_model_name_or_path, config.exclude_modules) == ("base", ["b"])
    assert (config.modules_to_save, config.lora_bias, config.bias) == (["c"], True, "none")


def test_names_that_are_exactly_these_modules() -> None:
    index = ModuleIndex(models.make("llama"))
    every = [path for path in index.slots if path.endswith("q_proj")]
    assert names_for(index, every) == (["q_proj"], None)
    assert names_for(index, every[:1]) == (["0.self_attn.q_proj"], None)
    assert names_for(index, ["lm_head", *every]) == (["lm_head", "q_proj"], None)
