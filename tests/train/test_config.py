from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from veneer.core.config import LoraConfig
from veneer.core.errors import ConfigError, UsageError
from veneer.core.task_type import TaskType
from veneer.train.config import LEARNING_RATES, RunConfig, adapter_fields


def test_the_adapters_fields_are_those_of_lora_config() -> None:
    plain = LoraConfig()
    config = RunConfig(output="x")
    for name in adapter_fields():
        assert getattr(config, name) == getattr(plain, name)
        assert RunConfig.model_fields[name].description
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
        ({"output": "x", "learning_rat": 1}, r"no field 'learning_rat'\. Did you mean 'learning_rate'\?"),
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
