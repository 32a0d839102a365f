"""What vLLM's loader would make of an adapter: one finding for each thing that stands against it.

The rules were read from vLLM's source; here each is met by an adapter that has exactly that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.making import config_of, reconfigure, saved
from veneer import AdapterFileError, UsageError
from veneer.adapters import files
from veneer.adapters.derived import write
from veneer.adapters.export import VLLM_RANKS, VllmCheck, check_vllm
from veneer.adapters.resize import resize

WEIGHTS = "adapter_model.safetensors"


def problems(check: VllmCheck) -> list[str]:
    return [finding.what for finding in check.findings if finding.blocks]


def with_tensors(folder: Path, **more: torch.Tensor) -> None:
    prefixed = {f"base_model.model.{key}": tensor for key, tensor in more.items()}
    save_file({**load_file(folder / WEIGHTS), **prefixed}, folder / WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter")


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}], ids=str)
@pytest.mark.parametrize(("r", "fits"), [(1, 1), (4, 8), (8, 8), (9, 16), (16, 16)])
def test_what_it_takes(config: dict[str, Any], r: int, fits: int, tmp_path: Path) -> None:
    check = check_vllm(saved(tmp_path, r=r, **config), model_type="llama")
    assert (check.takes_it, check.max_lora_rank, check.findings) == (True, fits, ())


@pytest.mark.parametrize(
    ("fields", "sentence", "do"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is ADALORA", "veneer convert"),
        ({"use_dora": True}, "use_dora is on", "veneer convert (--r or --energy"),
        ({"bias": "all"}, "bias is 'all'", "veneer merge"),
        ({"bias": "lora_only"}, "bias is 'lora_only'", "veneer merge"),
        ({"lora_bias": True}, "lora_bias is on", "veneer merge"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"]', "veneer merge"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set", "--max-lora-trainable-tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'", "veneer convert"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'", "veneer convert"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'", "veneer convert"),
        ({"target_modules": None}, "target_modules is missing", "save the adapter again"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set", "veneer merge"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set", "veneer merge"),
        ({"use_qalora": True}, "use_qalora is set", "veneer merge"),
        ({"target_parameters": ["w1"]}, "target_parameters is set", "veneer merge"),
        ({"r": 0}, "r is 0", "save the adapter again"),
        ({"lora_alpha": None}, "lora_alpha None", "save the adapter again"),
        ({"alpha_pattern": {"q_proj": 5}}, "2 of 14 layers have a factor of their own", "veneer resize --r 4"),
    ],
    ids=str,
)
def test_options_that_it_refuses_or_scales_wrongly(
    fields: dict[str, Any], sentence: str, do: str, folder: Path
) -> None:
    reconfigure(folder, **fields)
    check = check_vllm(folder, model_type="llama")
    assert not check.takes_it
    [finding] = check.findings
    assert sentence in finding.what
    assert do in finding.do


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_only_fill_the_factors(start: bool | str, folder: Path) -> None:
    reconfigure(folder, init_lora_weights=start)
    assert check_vllm(folder, model_type="llama").takes_it


def test_patterns_with_one_factor_are_fine(tmp_path: Path) -> None:
    pattern = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    check = check_vllm(saved(tmp_path / "a", **pattern), model_type="llama")
    assert check.takes_it
    assert check.max_lora_rank == 8
    check = check_vllm(saved(tmp_path / "b", rank_pattern={"q_proj": 12}), model_type="llama")
    assert problems(check) == [finding.what for finding in check.findings]
    assert check.max_lora_rank == 16


def test_a_start_is_one_finding(tmp_path: Path) -> None:
    check = check_vllm(saved(tmp_path, init_lora_weights="pissa", target_modules=["q_proj"]), model_type="llama")
    assert ["init_lora_weights is 'pissa'" in what for what in problems(check)] == [True]


def test_what_resize_writes_has_one_factor(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", rank_pattern={"q_proj": 2, "down_proj": 6}, use_rslora=True)
    assert not check_vllm(folder, model_type="llama").takes_it
    for number, rank in enumerate((6, 0.8)):
        new, _ = resize(files.read(folder), rank)
        write(tmp_path / f"{number}", new, figures={})
        assert check_vllm(tmp_path / f"{number}", model_type="llama").takes_it


@pytest.mark.parametrize(("given", "takes"), [(None, True), (8, False), (16, True), (512, True)])
def test_the_servers_rank(given: int | None, takes: bool, tmp_path: Path) -> None:
    check = check_vllm(saved(tmp_path, r=9), max_lora_rank=given, model_type="llama")
    assert check.takes_it is takes
    if not takes:
        assert "start vLLM with --max-lora-rank 16, or veneer resize --r 8" in check.findings[0].do


def test_a_rank_above_all(tmp_path: Path) -> None:
    check = check_vllm(saved(tmp_path, r=VLLM_RANKS[-1] + 1, target_modules=["q_proj"]), model_type="llama")
    assert (problems(check), check.max_lora_rank) == (["the rank is 513; vLLM's highest is 512"], 0)
    with pytest.raises(UsageError, match="max_lora_rank is 20; vLLM takes 1, 8, 16"):
        check_vllm(tmp_path, max_lora_rank=20)


def test_tensors_that_are_no_factors(folder: Path) -> None:
    with_tensors(folder, **{"model.norm.weight": torch.ones(4), "model.embed_tokens.weight": torch.ones(3, 4)})
    assert problems(check_vllm(folder, model_type="llama")) == [
        "2 tensors are no factors of a LoRA: base_model.model.model.embed_tokens.weight, "
        "base_model.model.model.norm.weight"
    ]


def test_the_bases_own_embedding_is_skipped(folder: Path) -> None:
    with_tensors(folder, **{"lm_head.base_layer.weight": torch.ones(3, 4)})
    check = check_vllm(folder, model_type="llama")
    assert check.takes_it
    assert "newer releases skip and older ones refuse" in check.findings[0].what


def test_convolutions(folder: Path) -> None:
    more = {"conv.lora_A.weight": torch.ones(4, 3, 2, 2), "conv.lora_B.weight": torch.ones(5, 4, 1, 1)}
    with_tensors(folder, **more)
    assert "2 factors are of convolutions" in problems(check_vllm(folder, model_type="llama"))[0]


@pytest.mark.parametrize(
    ("model_type", "blocks", "sentence"),
    [
        (None, False, "the base model's config was not found"),
        ("gpt2", True, "vLLM has no LoRA for the architecture 'gpt2'"),
        ("qwen2", None, ""),
        ("wav2vec2", False, "'wav2vec2' is not among those that are known"),
    ],
)
def test_architectures(model_type: str | None, blocks: bool | None, sentence: str, folder: Path) -> None:
    check = check_vllm(folder, model_type=model_type)
    assert [(finding.blocks, sentence in finding.what) for finding in check.findings] == (
        [] if blocks is None else [(blocks, True)]
    )


@pytest.mark.parametrize(("model_type", "takes"), [("llama", True), ("qwen2", False)])
def test_adapted_embeddings(model_type: str, takes: bool, tmp_path: Path) -> None:
    check = check_vllm(saved(tmp_path, target_modules=["q_proj", "embed_tokens"]), model_type=model_type)
    assert check.takes_it is takes


def test_several_things_at_once(folder: Path) -> None:
    reconfigure(folder, use_dora=True, lora_bias=True, modules_to_save=["lm_head"])
    with_tensors(folder, **{"lm_head.weight": torch.ones(3, 4), "q.lora_magnitude_vector": torch.ones(3)})
    assert len(problems(check_vllm(folder, model_type="llama"))) == 3


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"lora_alpha": True}, "has lora_alpha True"),
        ({"rank_pattern": {"q": "x"}}, "expected a number"),
        ({"rank_pattern": [1]}, "expected a mapping to numbers"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
    ],
    ids=str,
)
def test_numbers_that_nobody_could_use(fields: dict[str, Any], sentence: str, folder: Path) -> None:
    reconfigure(folder, **fields)
    with pytest.raises(AdapterFileError, match=sentence):
        check_vllm(folder)


def test_folders_without_an_adapter(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"has no adapter_config\.json"):
        check_vllm(folder.parent)
    (folder / WEIGHTS).write_bytes(b"half")
    with pytest.raises(AdapterFileError, match="not a complete safetensors file"):
        check_vllm(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"has no adapter_model\.safetensors.*save it as safetensors"):
        check_vllm(folder)
    assert config_of(folder)
