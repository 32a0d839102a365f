"""The settings of starts: PEFT's classes field by field, in every spelling, and nothing that is silently left out."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import peft
import pytest
from peft.tuners.lora.config import CordaConfig as TheirCorda

import veneer
from veneer import ConfigError, LoraConfig, PeftConfig

KINDS = {
    "loftq": (veneer.LoftQConfig, peft.LoftQConfig),
    "eva": (veneer.EvaConfig, peft.EvaConfig),
    "corda": (veneer.CordaConfig, TheirCorda),
    "lora_ga": (veneer.LoraGAConfig, peft.LoraGAConfig),
}
GOOD: dict[str, list[dict[str, Any]]] = {
    "loftq": [{"loftq_bits": 4}, {"loftq_bits": 8}, {"loftq_iter": 5}],
    "eva": [
        *({"rho": value} for value in (1, 1.0, 3.5)),
        *({"tau": value} for value in (0, 0.5, 1)),
        *({name: value} for name in ("use_label_mask", "whiten", "adjust_scaling_factors") for value in (True, False)),
        {"label_mask_value": 0},
    ],
    "corda": [
        *({"corda_method": value} for value in ("ipm", "kpm")),
        *({name: value} for name in ("verbose", "use_float16_for_covariance") for value in (True, False)),
        *({name: value} for name in ("cache_file", "covariance_file") for value in (None, "a/b.safetensors")),
        {"prune_temporary_fields": True},
    ],
    "lora_ga": [
        *({"direction": value} for value in ("ArBr", "A2rBr", "ArB2r", "random")),
        *({"scale": value} for value in ("stable", "weight_svd", "gd_scale", "unit")),
        {"stable_gamma": 1},
    ],
}
BAD: dict[str, list[dict[str, Any]]] = {
    "loftq": [{"loftq_bits": 2}, {"loftq_iter": 0}, {"loftq_iter": True}, {"loftq_iter": 1.5}],
    "eva": [
        *({"rho": value} for value in (0.5, float("inf"), "2", True)),
        *({"tau": value} for value in (-0.1, 1.1, None)),
        *({name: 1} for name in ("use_label_mask", "whiten", "adjust_scaling_factors")),
        {"label_mask_value": 0.5},
    ],
    "corda": [
        {"corda_method": "imp"},
        {"verbose": 1},
        {"use_float16_for_covariance": None},
        {"cache_file": 3},
        {"covariance_file": False},
        {"prune_temporary_fields": False},
    ],
    "lora_ga": [{"direction": "arbr"}, {"scale": "big"}, {"stable_gamma": 0}, {"stable_gamma": True}],
}


@pytest.mark.parametrize("start", KINDS)
def test_fields_and_defaults_are_pefts(start: str) -> None:
    ours, theirs = KINDS[start]
    assert {f.name: f.default for f in dataclasses.fields(ours)} == {
        f.name: f.default for f in dataclasses.fields(theirs) if f.init
    }


@pytest.mark.parametrize(("start", "given"), [(start, given) for start in GOOD for given in GOOD[start]])
def test_good_values_go_through_the_file_and_into_peft(start: str, given: dict[str, Any]) -> None:
    kind, theirs = KINDS[start]
    config = LoraConfig(init_lora_weights=start, **{f"{start}_config": given})
    held = getattr(config, f"{start}_config")
    assert held == kind(**given)
    assert getattr(LoraConfig(init_lora_weights=start, **{f"{start}_config": held}), f"{start}_config") is held
    written = json.loads(config.to_json())
    again = PeftConfig.from_dict(written)
    assert again == dataclasses.replace(config, peft_version=again.peft_version, inference_mode=True)
    assert written[f"{start}_config"] == dataclasses.asdict(theirs(**given))
    if start != "loftq":  # which PEFT refuses without scipy
        read = peft.LoraConfig(**{k: v for k, v in written.items() if k != "peft_type"})
        assert getattr(read, f"{start}_config") == theirs(**given)


def test_every_field_has_good_and_bad_values_here() -> None:
    for start, (kind, _) in KINDS.items():
        names = {f.name for f in dataclasses.fields(kind)}
        assert {name for given in GOOD[start] for name in given} == names
        assert {name for given in BAD[start] for name in given} == names


@pytest.mark.parametrize(("start", "given"), [(start, given) for start in BAD for given in BAD[start]])
def test_bad_values_are_refused_by_name(start: str, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"In {start}_config: {next(iter(given))} "):
        LoraConfig(init_lora_weights=start, **{f"{start}_config": given})


@pytest.mark.parametrize("start", KINDS)
def test_defaults_stand_when_none_are_given(start: str) -> None:
    assert getattr(LoraConfig(init_lora_weights=start), f"{start}_config") == KINDS[start][0]()


def test_an_unknown_field_and_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"In eva_config: EvaConfig has no field 'roh'.*rho"):
        LoraConfig(init_lora_weights="eva", eva_config={"roh": 2})
    with pytest.raises(ConfigError, match=r"expected a EvaConfig or a mapping"):
        LoraConfig(init_lora_weights="eva", eva_config=veneer.LoftQConfig())


@pytest.mark.parametrize("start", KINDS)
def test_the_settings_of_another_start_are_left_out_and_said(start: str) -> None:
    with pytest.warns(UserWarning, match=f"{start}_config has no effect with init_lora_weights=True"):
        config = LoraConfig(**{f"{start}_config": GOOD[start][0]})
    assert config == LoraConfig()


def test_two_frozen_factors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"use_lorafa=True freezes A and .*mica"):
        LoraConfig(init_lora_weights="mica", use_lorafa=True)


@pytest.mark.parametrize("value", ["pissa_niter", "pissa_niter_", "pissa_niter_x", "pisa", "lora-ga", "pissa_16"])
def test_a_start_that_is_none_is_refused_with_the_nearest(value: str) -> None:
    with pytest.raises(ConfigError, match=r"init_lora_weights is .*pissa_niter_N"):
        LoraConfig(init_lora_weights=value)
