"""LoraConfig: PEFT's fields and defaults, every value of every option, and refusals that name what is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest

from veneer import AdapterFileError, ConfigError, DiskError, LoraConfig, PeftConfig, TaskType, UsageError
from veneer.core import registry
from veneer.core.config import LowRankConfig, field_docs

# How an adapter is trained, not what it is: never in a file, and not PEFT's.
OWN = {"use_lorafa"}
OURS = {f.name for f in dataclasses.fields(LoraConfig)} - OWN
THEIRS = {f.name: f for f in dataclasses.fields(peft.LoraConfig)}


def default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def test_every_field_of_peft_is_a_field_or_refused_by_name() -> None:
    assert set(THEIRS) >= OURS
    assert set(THEIRS) == OURS | set(LoraConfig.not_built)


def test_defaults_are_pefts() -> None:
    ours, theirs = LoraConfig(), peft.LoraConfig()
    for name in OURS - {"peft_type", "peft_version"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.peft_type == theirs.peft_type.value


def test_file_holds_pefts_keys_with_pefts_defaults(tmp_path: Path) -> None:
    peft.LoraConfig().save_pretrained(str(tmp_path))
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = json.loads(LoraConfig().to_json())
    assert ours.keys() == theirs.keys()
    # PEFT's config object saves its own inference_mode; veneer always writes a config for use, as PEFT's model does.
    theirs["inference_mode"] = True
    assert ours == theirs
    assert list(ours) == sorted(ours)


# A value other than the default for every option that this release refuses.
REFUSED = {
    "runtime_config": {"ephemeral_gpu_offload": True},
    "megatron_config": {"a": 1},
    "megatron_core": "other",
    "velora_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "use_bdlora": {"a": 1},
    "arrow_config": {"a": 1},
    "kasa_config": {"a": 1},
}


def test_every_unsupported_option_has_a_refused_value_here() -> None:
    assert REFUSED.keys() == dict(LoraConfig.not_built).keys()


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_option_is_refused_and_accepted_at_its_default(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        LoraConfig(**{name: REFUSED[name]})
    with pytest.raises(ConfigError, match=name):
        PeftConfig.from_dict({"peft_type": "LORA", name: REFUSED[name]})
    assert set(LoraConfig.reasons) == set(LoraConfig.not_built)
    with pytest.raises(ConfigError, match=re.escape(LoraConfig.reasons[name])):
        LoraConfig(**{name: REFUSED[name]})
    own = LoraConfig.not_built[name]
    assert LoraConfig(**{name: own}) == LoraConfig()
    if name != "runtime_config":  # a default object of PEFT's own, kept out of files
        assert own == default(THEIRS[name])


def test_pefts_objects_of_options_are_accepted_when_nothing_in_them_is_on() -> None:
    assert LoraConfig(runtime_config=peft.LoraRuntimeConfig()) == LoraConfig()
    assert LoraConfig(runtime_config={"ephemeral_gpu_offload": False}) == LoraConfig()
    with pytest.raises(ConfigError, match="ephemeral_gpu_offload"):
        LoraConfig(runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert "runtime_config" not in LoraConfig().to_dict()


GOOD: list[tuple[str, Any, Any]] = [
    ("r", 1, 1),
    ("r", 64, 64),
    ("lora_alpha", 16, 16),
    ("lora_alpha", 0.5, 0.5),
    ("lora_dropout", 0.0, 0.0),
    ("lora_dropout", 0.99, 0.99),
    ("lora_dropout", 0, 0),
    ("fan_in_fan_out", True, True),
    ("use_rslora", True, True),
    ("lora_bias", True, True),
    ("use_dora", True, True),
    ("use_lorafa", True, True),
    ("inference_mode", True, True),
    *[("bias", value, value) for value in ("none", "all", "lora_only")],
    ("init_lora_weights", True, True),
    ("init_lora_weights", False, False),
    ("init_lora_weights", "gaussian", "gaussian"),
    ("init_lora_weights", "PiSSA_niter_16", "pissa_niter_16"),
    # With values of their own they are tested in test_start_config.py.
    ("loftq_config", {}, {}),
    *[(f"{start}_config", None, None) for start in ("eva", "corda", "lora_ga")],
    # As PEFT: any case. The names of PEFT's true and false are written as PEFT reads them.
    ("init_lora_weights", "Gaussian", "gaussian"),
    ("init_lora_weights", "kaiming", True),
    ("init_lora_weights", "random", False),
    ("target_modules", None, None),
    ("target_modules", "all-linear", "all-linear"),
    ("target_modules", r".*\.q_proj", r".*\.q_proj"),
    ("target_modules", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ("target_modules", ["q_proj", "q_proj"], ["q_proj"]),
    ("target_modules", ("v_proj", "q_proj"), ["v_proj", "q_proj"]),
    ("target_modules", {"v_proj", "q_proj"}, ["q_proj", "v_proj"]),
    ("ensure_weight_tying", True, True),
    ("target_parameters", None, None),
    ("target_parameters", ["experts.up", "experts.up"], ["experts.up"]),
    ("target_parameters", {"up", "down"}, ["down", "up"]),
    ("exclude_modules", ["lm_head"], ["lm_head"]),
    ("exclude_modules", "lm_.*", "lm_.*"),
    ("modules_to_save", ["classifier"], ["classifier"]),
    ("modules_to_save", None, None),
    ("rank_pattern", {"q_proj": 4}, {"q_proj": 4}),
    ("rank_pattern", None, {}),
    ("alpha_pattern", {"q_proj": 4.5}, {"q_proj": 4.5}),
    ("layers_to_transform", 0, 0),
    ("layers_to_transform", [0, 3], [0, 3]),
    ("layers_to_transform", [], []),
    ("layers_to_transform", None, None),
    ("base_model_name_or_path", "a/b", "a/b"),
    ("base_model_name_or_path", Path("/a/b"), "/a/b"),
    ("revision", "main", "main"),
    ("auto_mapping", {"base_model_class": "X"}, {"base_model_class": "X"}),
    ("peft_type", "LORA", "LORA"),
    ("peft_type", "lora", "LORA"),
    ("peft_version", "0.10.0", "0.10.0"),
    ("task_type", "CAUSAL_LM", TaskType.CAUSAL_LM),
    ("task_type", peft.TaskType.QUESTION_ANS, TaskType.QUESTION_ANSWERING),
    ("layers_pattern", None, None),
    ("layer_replication", None, None),
    ("layer_replication", [[0, 4], (2, 5)], [[0, 4], [2, 5]]),
    ("use_qalora", True, True),
    ("qalora_group_size", 16, 16),
    ("alora_invocation_tokens", None, None),
    ("alora_invocation_tokens", [5, 9, 5], [5, 9, 5]),
    ("trainable_token_indices", None, None),
    ("trainable_token_indices", [7, 3], [7, 3]),
    ("trainable_token_indices", {"embed_tokens": [3]}, {"embed_tokens": [3]}),
]


@pytest.mark.parametrize(
    ("name", "value", "kept"), GOOD, ids=lambda v: str(sorted(v) if isinstance(v, set) else v)[:30]
)
def test_accepted_values(name: str, value: Any, kept: Any) -> None:
    assert getattr(LoraConfig(**{name: value}), name) == kept


def test_every_field_has_an_accepted_value_here() -> None:
    assert {name for name, _, _ in GOOD} == OURS | OWN


@pytest.mark.parametrize("pattern", ["layers", ["layers", "blocks"], r"h\w*"])
def test_layers_pattern(pattern: Any) -> None:
    assert LoraConfig(layers_to_transform=[1], layers_pattern=pattern).layers_pattern == pattern


BAD: list[tuple[str, Any]] = [
    *[("r", value) for value in (0, -1, 1.5, "8", True, None)],
    *[("lora_alpha", value) for value in (0, -1, "16", None, float("inf"), float("nan"), True)],
    *[("lora_dropout", value) for value in (1.0, -0.1, "0.1", None, float("nan"))],
    *[("bias", value) for value in ("lora-only", True, None, ["all"])],
    *[("fan_in_fan_out", value) for value in (1, "true", None)],
    *[("use_rslora", value) for value in (1, "true", None)],
    *[("lora_bias", value) for value in (1, "true", None)],
    *[("inference_mode", value) for value in (1, "true", None)],
    *[("init_lora_weights", value) for value in ("gausian", "pisa", "pissa_niter", 3, None)],
    *[("target_modules", value) for value in ("", [], [""], [1], 3, "(", ["q", None])],
    *[("exclude_modules", value) for value in ("", [1], "(")],
    *[("modules_to_save", value) for value in ("classifier", [1], 3)],
    *[("rank_pattern", value) for value in ([], {"q": 0}, {"q": 1.5}, {"(": 4}, {"q": "4"}, {1: 4})],
    *[("alpha_pattern", value) for value in ([], {"q": 0}, {"(": 4}, {"q": None})],
    *[("layers_to_transform", value) for value in ("0", [-1], [0.5], {}, -1, True)],
    *[("task_type", value) for value in ("CAUSAL", "", 5, ["CAUSAL_LM"], {})],
    *[("peft_type", value) for value in ("VERA", 3, None)],
    *[("base_model_name_or_path", value) for value in (5, ["a"])],
    *[("revision", value) for value in (5,)],
    *[("auto_mapping", value) for value in ("x", [1])],
    *[("peft_version", value) for value in (1,)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: str(v)[:30])
def test_refused_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        LoraConfig(**{name: value})
    if name != "peft_type" and value != {1: 4}:  # in JSON every key is a text
        with pytest.raises(ConfigError, match=name):
            PeftConfig.from_dict(json.loads(json.dumps({name: value}, default=str)))


@pytest.mark.parametrize("pattern", ["(", ["("], [3], 3])
def test_bad_layers_pattern(pattern: Any) -> None:
    with pytest.raises(ConfigError, match="layers_pattern"):
        LoraConfig(layers_to_transform=[1], layers_pattern=pattern)


def test_combinations_without_meaning() -> None:
    with pytest.raises(ConfigError, match="layers_pattern is set without"):
        LoraConfig(layers_pattern="layers")
    with pytest.raises(ConfigError, match="regular expression"):
        LoraConfig(target_modules=".*q_proj", layers_to_transform=[1])


@pytest.mark.parametrize(
    ("alpha", "expected"), [(16, {"q": 8, "v": 64, ".*o": 2}), (3, {"q": 1.5, "v": 12, ".*o": 0.375})]
)
def test_alphas_that_match_the_ranks_are_numbers_in_the_file(alpha: int, expected: dict[str, float]) -> None:
    config = LoraConfig(r=8, lora_alpha=alpha, rank_pattern={"q": 4, "v": 32, ".*o": 1}, alpha_pattern="match")
    assert json.loads(config.to_json())["alpha_pattern"] == config.alpha_pattern == expected
    assert {key: value / config.rank_pattern[key] for key, value in expected.items()} == dict.fromkeys(
        expected, alpha / 8
    )
    assert dataclasses.replace(config, task_type="CAUSAL_LM").alpha_pattern == expected


def test_matching_alphas_where_they_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="alpha_pattern='match' goes with rank_pattern"):
        LoraConfig(alpha_pattern="match")
    with pytest.raises(ConfigError, match="alpha_pattern='match' has no meaning with use_rslora"):
        LoraConfig(alpha_pattern="match", rank_pattern={"q": 4}, use_rslora=True)
    with pytest.raises(ConfigError, match="alpha_pattern is 'macht'"):
        LoraConfig(alpha_pattern="macht", rank_pattern={"q": 4})


def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no field 'lora_apha'.*'lora_alpha'"):
        LoraConfig(lora_apha=16)
    with pytest.raises(ConfigError, match=r"target_module='q'.*'target_modules'"):
        PeftConfig.from_dict({"target_module": "q"})


def test_unknown_key_that_is_off_is_accepted() -> None:
    # Later releases of PEFT add fields; one that is null, false or empty changes nothing.
    for off in (None, False, [], {}, ""):
        assert PeftConfig.from_dict({"use_something_new": off}) == LoraConfig()


def test_kinds_of_adapter_that_are_not_here() -> None:
    with pytest.raises(ConfigError, match="PROMPT_TUNING"):
        PeftConfig.from_dict({"peft_type": "PROMPT_TUNING"})


def test_shared_fields_are_abstract() -> None:
    for abstract in (PeftConfig, LowRankConfig):
        with pytest.raises(TypeError, match="abstract"):
            abstract()


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=2.5,
        target_modules={"b", "a"},
        modules_to_save=["head"],
        rank_pattern={"a": 2},
        task_type="IMAGE_CLASSIFICATION",
        use_rslora=True,
        init_lora_weights="gaussian",
    )
    config.save_pretrained(tmp_path / "new" / "folder")
    again = PeftConfig.from_pretrained(tmp_path / "new" / "folder", inference_mode=False)
    assert dataclasses.replace(again, peft_version=None) == config
    assert LoraConfig.from_pretrained(tmp_path / "new" / "folder", r=2).r == 2


@pytest.mark.parametrize("task", list(TaskType))
def test_every_task_survives_the_file_that_peft_reads(task: TaskType, tmp_path: Path) -> None:
    LoraConfig(task_type=task, target_modules=["q"]).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).task_type is task
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert theirs.task_type == task.peft_name


def test_peft_reads_our_config_and_we_read_theirs(tmp_path: Path) -> None:
    fields = {
        "r": 3,
        "lora_alpha": 9,
        "target_modules": ["q", "v"],
        "rank_pattern": {"q": 2},
        "layers_to_transform": [0],
        "bias": "lora_only",
        "task_type": "SEQ_CLS",
        "init_lora_weights": "gaussian",
    }
    LoraConfig(**fields).save_pretrained(tmp_path / "ours")
    theirs = peft.LoraConfig.from_pretrained(str(tmp_path / "ours"))
    peft.LoraConfig(**fields).save_pretrained(str(tmp_path / "theirs"))
    ours = LoraConfig.from_pretrained(tmp_path / "theirs")
    for name in fields:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (set(mine), set(other)) == (set(other), set(mine)) if name == "target_modules" else mine == other


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[1, 2]",
        b'"text"',
        b"null",
        b'{"r": 8',
        b"\xff\xfe\x00",
        b'{"r": "\xe9"}',
        b"[" * 100_000,
        b'{"r":' * 100_000,
        b'{"r": ' + b"1" * 10_000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
    ids=range(12),
)
def test_broken_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(tmp_path)


def test_missing_folder_or_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no folder"):
        PeftConfig.from_pretrained(tmp_path / "absent")


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        LoraConfig().save_pretrained(tmp_path / "file")


def test_every_field_is_documented() -> None:
    docs = field_docs(LoraConfig)
    assert docs.keys() == OURS | OWN
    assert all(text.endswith(".") for text in docs.values())


def test_trainers_questions_have_answers() -> None:
    assert not LoraConfig().is_prompt_learning
    assert not LoraConfig().is_adaption_prompt


def test_every_start_in_the_rooms_can_be_chosen() -> None:
    for name in registry.names("inits"):
        given = f"{name}_4" if name == "pissa_niter" else name
        assert LoraConfig(init_lora_weights=given).init == name
    assert LoraConfig().init == "kaiming"
    assert LoraConfig(init_lora_weights=False).init == "random"
