from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from veneer.core.config import LoraConfig
from veneer.core.errors import ConfigError, UsageError
from veneer.core.peft_config import PeftConfig, config_classes
from veneer.core.task_type import TaskType
from veneer.train.config import LEARNING_RATES, RunConfig
from veneer.train.families import FAMILIES, FAMILY, adapter_fields, fields_of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapters_fields_are_those_of_the_familys_config(family: str) -> None:
    plain = FAMILIES[family](**({"total_step": 1} if family == "adalora" else {}))
    config = RunConfig(output="x", family=family)
    for name in fields_of(family):
        assert getattr(config, name) == getattr(plain, name)
        assert RunConfig.model_fields[name].description
    own = {f.name for f in dataclasses.fields(FAMILIES[family])} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert set(fields_of(family)) == own - FAMILIES[family].not_asked
    assert config.adapter() == plain
    assert RunConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert set(config.to_dict()) & set(adapter_fields()) == {FAMILY, *fields_of(family)}


def test_every_family_of_variants_can_be_chosen() -> None:
    assert set(FAMILIES.values()) == set(config_classes().values())


def test_a_familys_own_default_is_used() -> None:
    assert RunConfig(output="x", family="vera").r == 256
    assert RunConfig(output="x", family="vera", r=8).adapter().r == 8
    assert RunConfig(output="x").r == 8


@pytest.mark.parametrize(
    ("family", "field", "value", "owner"),
    [
        ("lora", "init_r", 4, "adalora"),
        ("lora", "vera_dropout", 0.1, "vera"),
        ("adalora", "use_dora", True, "lora"),
        ("adalora", "r", 4, "lora, vera"),
        ("vera", "lora_alpha", 3, "lora, adalora"),
        ("vera", "rank_pattern", {"q": 3}, "lora"),
    ],
)
def test_fields_of_another_family_are_refused(family: str, field: str, value: Any, owner: str) -> None:
    message = f"{field} has no meaning with family={family}; it is for adapters of family {owner}"
    with pytest.raises(ConfigError, match=message):
        RunConfig(output="x", family=family, **{field: value})


def test_a_bias_of_another_family_is_refused() -> None:
    assert RunConfig(output="x", family="vera", bias="vera_only").adapter().bias == "vera_only"
    with pytest.raises(ConfigError, match="bias is 'vera_only'"):
        RunConfig(output="x", bias="vera_only")


def test_a_rate_for_the_head_is_for_what_trains_more_than_it() -> None:
    assert RunConfig(output="x", method="full", head_learning_rate=1e-3).head_learning_rate == 1e-3
    with pytest.raises(ConfigError, match="head_learning_rate has no meaning with method=head"):
        RunConfig(output="x", method="head", head_learning_rate=1e-3)
    with pytest.raises(ConfigError, match="head_learning_rate is 0"):
        RunConfig(output="x", head_learning_rate=0)


def test_loraplus_is_for_adapters() -> None:
    assert RunConfig(output="x", loraplus_lr_ratio=16).loraplus_lr_ratio == 16
    with pytest.raises(ConfigError, match="loraplus_lr_ratio has no meaning with method=full"):
        RunConfig(output="x", method="full", loraplus_lr_ratio=16)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio is 0"):
        RunConfig(output="x", loraplus_lr_ratio=0)


def test_options_of_lora_config() -> None:
    assert {"r", "lora_alpha", "target_modules", "init_lora_weights", "rank_pattern"} <= set(adapter_fields())
    assert not {"task_type", "inference_mode"} & set(adapter_fields())
    given = RunConfig(output="x", r=3, target_modules=["a"], init_lora_weights="gaussian", use_rslora=True)
    assert given.adapter(TaskType.CAUSAL_LM) == dataclasses.replace(
        LoraConfig(r=3, target_modules=["a"], init_lora_weights="gaussian", use_rslora=True),
        task_type=TaskType.CAUSAL_LM,
    )


def test_every_field_has_a_line_of_description() -> None:
    assert all(field.description for field in RunConfig.model_fields.values())


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_the_learning_rate_follows_the_method(method: str) -> None:
    assert RunConfig(output="x", method=method).learning_rate == LEARNING_RATES[method]
    assert RunConfig(output="x", method=method, learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"has no output: the run folder to write"),
        (
            {"output": "x", "learning_rat": 1},
            r"no field 'learning_rat'\. Did you mean 'learning_rate' or 'head_learning_rate'\?",
        ),
        ({"output": "x", "lora_alhpa": 1, "zzz": 2}, r"no field 'lora_alhpa', 'zzz'\. Did you mean 'lora_alpha'"),
        ({"output": "x", "r": 0}, r"r is 0; expected a whole number of at least 1"),
        ({"output": "x", "epochs": -1}, r"epochs is -1; input should be greater than 0"),
        ({"output": "x", "batch_size": 0}, r"batch_size is 0; input should be greater than or equal to 1"),
        ({"output": "x", "schedule": "cosin"}, r"schedule is 'cosin'; input should be 'cosine', 'linear'"),
        ({"output": "x", "learning_rate": float("nan")}, r"learning_rate is nan"),
        ({"output": "x", "max_steps": "many"}, r"max_steps is 'many'; input should be a valid integer"),
        ({"output": "x", "method": "full", "r": 16}, r"r has no meaning with method=full"),
        ({"output": "x", "init_lora_weights": "gausian"}, r"init_lora_weights is 'gausian'.*Did you mean 'gaussian'"),
    ],
)
def test_bad_values_are_one_sentence(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig(**values)
    assert "\n" not in str(caught.value)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = RunConfig(
        model="m", data="d", output="x", learning_rate=2e-4, clip=None, rank_pattern={"q_proj": 4}, lora_dropout=0.1
    )
    (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.read(tmp_path / "run.yaml") == config
    assert RunConfig.read(tmp_path / "run.yaml", output="y", r=2) == RunConfig(
        **{**config.model_dump(), "output": "y", "r": 2}
    )
    full = RunConfig(output="x", method="full")
    assert "lora_alpha" not in full.to_yaml()
    (tmp_path / "run.yaml").write_text(full.to_yaml(), encoding="utf-8")
    assert RunConfig.read(tmp_path / "run.yaml") == full


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("output: x\nlearning_rate: 2e-4\n")
    assert RunConfig.read(tmp_path / "run.yaml").learning_rate == 2e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"output: [x", "not readable as YAML"),
        (b"\xff\xfe\xfa", "not readable as YAML"),
        (b"- output", "holds a list; expected fields"),
        (b"", "holds nothing; expected fields"),
        (b"1: x", "holds a dict; expected fields"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        RunConfig.read(tmp_path / "run.yaml")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("output: x")
    with pytest.raises(UsageError, match=r"no config file .*Did you mean 'run\.yaml'"):
        RunConfig.read(tmp_path / "runs.yaml")
