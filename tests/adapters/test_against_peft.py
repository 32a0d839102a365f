"""PEFT is the truth: the same weights give the same outputs and gradients, and each reads the other's files.

Everything runs in float64, where two correct orders of summation agree to about 1e-13, so that a tolerance of
1e-9 hides nothing.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from tests import models

F64 = torch.float64

# Each: the kind of model, then the fields of LoraConfig, the same for both.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-names": ("llama", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "llama-dotted-name": ("llama", {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]}),
    "llama-regex": ("llama", {"target_modules": r".*\.layers\.1\..*(gate|up)_proj"}),
    "llama-all-linear": ("llama", {"target_modules": "all-linear", "r": 3}),
    "llama-rank-and-alpha": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "rank_pattern": {"q_proj": 4, r"layers\.1\.self_attn\.v_proj": 2},
            "alpha_pattern": {r".*layers\.0.*": 3, "v_proj": 20},
            "lora_alpha": 16,
        },
    ),
    "llama-rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"layers.1.*": 5}}),
    "llama-lora-bias-free": ("llama", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True}),
    "llama-layer-list": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "llama-layer-int": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    "llama-layer-patterns": (
        "llama",
        {"target_modules": ["down_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["layers"]},
    ),
    "llama-exclude-name": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "0.mlp.up_proj"]},
    ),
    "llama-exclude-regex": ("llama", {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0\..*"}),
    "llama-save-norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}),
    "llama-save-layer-norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "llama-save-head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama-save-embeddings": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama-head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "llama-gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "llama-random": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False}),
    "llama-float-alpha": ("llama", {"target_modules": ["q_proj"], "lora_alpha": 2.5}),
    "gpt2-default": ("gpt2", {"task_type": "CAUSAL_LM"}),
    "gpt2-conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-all-linear": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2-embeddings": ("gpt2", {"target_modules": ["wte", "wpe"]}),
    "gpt2-lora-bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "gpt2-bias-all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "opt-default": ("opt", {"task_type": "CAUSAL_LM"}),
    "opt-bias-all": ("opt", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "opt-bias-lora-only": ("opt", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "opt-lora-bias": ("opt", {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "opt-two-biases": ("opt", {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}),
    "gemma-embedding": ("gemma", {"target_modules": ["embed_tokens", "q_proj"]}),
    "bert-default": ("bert", {"task_type": "SEQ_CLS"}),
    "bert-embedding": ("bert", {"target_modules": ["word_embeddings", "query", "value"], "task_type": "SEQ_CLS"}),
    "bert-all-linear": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "bert-bias-all": ("bert", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bert-bias-lora-only": ("bert", {"target_modules": ["query"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
    "bert-save-more": (
        "bert",
        {"target_modules": ["query"], "modules_to_save": ["pooler.dense", "classifier"], "task_type": "SEQ_CLS"},
    ),
    "bert-tokens": ("bert-tokens", {"target_modules": ["query", "value"], "task_type": "TOKEN_CLS"}),
    "bert-qa": ("bert-qa", {"target_modules": ["query", "value"], "task_type": "QUESTION_ANS"}),
    "bert-body": ("bert-body", {"target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}),
    "distilbert": ("distilbert", {"target_modules": ["q_lin", "v_lin"], "task_type": "SEQ_CLS"}),
    "t5-default": ("t5", {"task_type": "SEQ_2_SEQ_LM"}),
    "t5-all-linear": ("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    "t5-layers": ("t5", {"target_modules": ["q", "wi"], "layers_to_transform": [1], "layers_pattern": "block"}),
    "t5-layers-unnamed": ("t5", {"target_modules": ["q", "wi"], "layers_to_transform": [1]}),
    "bert-layers-unnamed": ("bert", {"target_modules": ["dense"], "layers_to_transform": [0]}),
    "t5-relative-bias": ("t5", {"target_modules": ["relative_attention_bias", "v"]}),
    "whisper-names": ("whisper", {"target_modules": ["q_proj", "v_proj"]}),
    "whisper-all-linear": ("whisper", {"target_modules": "all-linear"}),
    "whisper-bias-all": ("whisper", {"target_modules": ["q_proj"], "bias": "all"}),
    "vit": ("vit", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    "vit-all-linear": ("vit", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "llama-dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "rank_pattern": {"q_proj": 3}}),
    "llama-dora-rslora": ("llama", {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True}),
    "opt-dora-bias": ("opt", {"target_modules": ["q_proj", "fc1"], "use_dora": True, "bias": "lora_only"}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "gemma-dora-embedding": ("gemma", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
}
# Input and output embeddings share a weight in GPT-2 and Gemma: veneer says so, which is tested in test_merge.py.
pytestmark = pytest.mark.filterwarnings("ignore:The adapter on .* does not reach:UserWarning")
everywhere = pytest.mark.parametrize("case", CASES)


def peft_model(case: str) -> peft.PeftModel:
    kind, fields = CASES[case]
    with warnings.catch_warnings():
        # PEFT remarks on what it decides by itself (fan_in_fan_out, embeddings): not what is tested.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(models.make(kind, dtype=F64), peft.LoraConfig(**fields))
    move(model)
    return model.eval()


def veneer_model(case: str) -> veneer.PeftModel:
    kind, fields = CASES[case]
    with warnings.catch_warnings():
        # fan_in_fan_out=True on a model without transposed layers warns, as PEFT does.
        warnings.simplefilter("ignore")
        model = veneer.get_peft_model(models.make(kind, dtype=F64), veneer.LoraConfig(**fields))
    move(model)
    return model.eval()


def move(model: nn.Module) -> None:
    """Move everything that learns off its start, by an amount that depends only on the name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name) * 1009 + sum(map(ord, name)))
                noise = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=F64)
                parameter.copy_(0.1 * parameter + noise)


def save(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        # PEFT says that it saves embeddings; transformers' offline lookup of a base without a name.
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return folder


def gradients(model: nn.Module, case: str) -> tuple[Tensor, dict[str, Tensor]]:
    kind, _ = CASES[case]
    model.zero_grad()
    out = models.output(model, models.batch(kind, dtype=F64))
    (out * torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def base_embeddings(keys: set[str]) -> set[str]:
    """The base's own tables, which PEFT writes beside a targeted embedding and veneer leaves out: the base has them."""
    return {key for key in keys if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))}


@everywhere
def test_peft_file_gives_the_same_outputs_and_gradients_and_is_written_back_bit_for_bit(
    case: str, tmp_path: Path
) -> None:
    theirs = peft_model(case)
    folder = save(theirs, tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(models.make(CASES[case][0], dtype=F64), folder, is_trainable=True).eval()
    again = save(ours, tmp_path / "ours")
    same_tensors(load_file(again / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors"))

    their_out, their_grads = gradients(theirs, case)
    our_out, our_grads = gradients(ours, case)
    torch.testing.assert_close(our_out, their_out, rtol=1e-9, atol=1e-9)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        torch.testing.assert_close(
            our_grads[name], grad, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@everywhere
def test_veneer_file_loads_in_peft(case: str, tmp_path: Path) -> None:
    ours = veneer_model(case)
    folder = save(ours, tmp_path / "a")
    with warnings.catch_warnings():
        # Missing keys would come as a warning: an error here, as all others. Three known remarks are not about keys.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message=".*lora_bias=True.* was passed but the targeted layer")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*")
        theirs = peft.PeftModel.from_pretrained(models.make(CASES[case][0], dtype=F64), folder).eval()
    inputs = models.batch(CASES[case][0], dtype=F64)
    torch.testing.assert_close(models.output(theirs, inputs), models.output(ours, inputs), rtol=1e-9, atol=1e-9)
    back = save(theirs, tmp_path / "back")
    same_tensors(load_file(folder / "adapter_model.safetensors"), load_file(back / "adapter_model.safetensors"))


@everywhere
def test_fresh_adapter_trains_the_same_parameters_from_the_same_kind_of_start(case: str) -> None:
    kind, fields = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks again
        theirs = peft.get_peft_model(models.make(kind), peft.LoraConfig(**fields))
        ours = veneer.get_peft_model(models.make(kind), veneer.LoraConfig(**fields))
    their_shapes = {name: p.shape for name, p in theirs.named_parameters() if p.requires_grad}
    our_shapes = {name: p.shape for name, p in ours.named_parameters() if p.requires_grad}
    assert our_shapes == their_shapes
    their_zeros = {name for name, p in theirs.named_parameters() if p.requires_grad and not p.any()}
    our_zeros = {name for name, p in ours.named_parameters() if p.requires_grad and not p.any()}
    assert our_zeros == their_zeros


@everywhere
def test_configs_on_disk_are_equal(case: str, tmp_path: Path) -> None:
    theirs = json.loads((save(peft_model(case), tmp_path / "a") / "adapter_config.json").read_text())
    ours = json.loads((save(veneer_model(case), tmp_path / "b") / "adapter_config.json").read_text())
    assert ours.keys() == theirs.keys()
    differ = {key for key in theirs if as_set(ours[key]) != as_set(theirs[key])}
    # PEFT writes both customary heads and the user's names; veneer the heads that the model has, by name.
    differ -= {"modules_to_save"}
    # PEFT's minimal names for all-linear and veneer's may differ; that they choose the same modules is
    # checked by the trained parameters above.
    if CASES[case][1].get("target_modules") == "all-linear":
        differ -= {"target_modules"}
    assert not differ, {key: (ours[key], theirs[key]) for key in differ}


def as_set(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    extra = theirs.keys() - ours.keys()
    assert ours.keys() <= theirs.keys()
    # PEFT's bias="all" also writes the biases of modules_to_save under their names in memory, which nothing reads.
    in_memory = {key for key in extra if ".original_module." in key or ".modules_to_save." in key}
    assert extra == base_embeddings(extra) | in_memory
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert", "t5"])
def test_default_targets_are_pefts(kind: str) -> None:
    ours = veneer.get_peft_model(models.make(kind), veneer.LoraConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out
        theirs = peft.get_peft_model(models.make(kind), peft.LoraConfig())
    assert set(ours.peft_config["default"].target_modules) == set(theirs.peft_config["default"].target_modules)


def test_llama_default_is_all_four_projections_on_purpose() -> None:
    # PEFT adapts q_proj and v_proj only.
    ours = veneer.get_peft_model(models.make("llama"), veneer.LoraConfig())
    assert sorted(ours.peft_config["default"].target_modules) == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_peft_file_with_biases_on_a_model_without_any_loads(tmp_path: Path) -> None:
    # PEFT accepts bias="all" where there is no bias. Veneer refuses it for a new adapter, but reads the file.
    theirs = peft.get_peft_model(models.make("t5"), peft.LoraConfig(target_modules=["q"], bias="all"))
    ours = veneer.PeftModel.from_pretrained(models.make("t5"), save(theirs, tmp_path))
    assert len(ours.match_report.targets) == 6
    with pytest.raises(veneer.ConfigError, match="bias"):
        veneer.get_peft_model(models.make("t5"), veneer.LoraConfig(target_modules=["q"], bias="all"))


def test_base_embeddings_that_differ_replace_the_bases_with_a_warning(tmp_path: Path) -> None:
    folder = save(peft_model("llama-embedding"), tmp_path)
    other = models.make("llama", seed=8, dtype=F64)
    with pytest.warns(UserWarning, match="replaces"):
        ours = veneer.PeftModel.from_pretrained(other, folder)
    saved = load_file(folder / "adapter_model.safetensors")["base_model.model.model.embed_tokens.base_layer.weight"]
    assert torch.equal(ours.get_base_model().get_input_embeddings().base_layer.weight, saved)


def test_save_embedding_layers_writes_pefts_keys(tmp_path: Path) -> None:
    theirs = load_file(save(peft_model("llama-embedding"), tmp_path / "a") / "adapter_model.safetensors")
    ours = veneer_model("llama-embedding")
    ours.save_pretrained(tmp_path / "b", save_embedding_layers=True)
    ours_keys = load_file(tmp_path / "b" / "adapter_model.safetensors").keys()
    # PEFT asks for a wrapped layer and so leaves out the untargeted head; "resized" writes both in either.
    assert theirs.keys() <= ours_keys <= theirs.keys() | {"base_model.model.lm_head.weight"}


@pytest.mark.parametrize("case", ["llama-rank-and-alpha", "gpt2-conv1d", "opt-lora-bias", "llama-embedding"])
def test_merged_weights_are_pefts(case: str, tmp_path: Path) -> None:
    theirs = peft_model(case)
    ours = veneer.PeftModel.from_pretrained(models.make(CASES[case][0], dtype=F64), save(theirs, tmp_path))
    # Tied embeddings are not compared: PEFT writes the merged table over the shared one and so moves the head too.
    merged, expected = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-12, atol=1e-12)


def test_two_active_adapters_add_up_as_in_peft(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "up_proj"], "r": 4}
    theirs = peft.get_peft_model(models.make("llama", dtype=F64), peft.LoraConfig(**fields), adapter_name="first")
    theirs.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=6))
    theirs.base_model.set_adapter(["first", "second"])
    move(theirs)
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(models.make("llama", dtype=F64), tmp_path / "first", "first")
    ours.load_adapter(tmp_path / "second", "second")
    ours.set_adapter(["first", "second"])
    inputs = models.batch("llama")
    torch.testing.assert_close(models.output(ours, inputs), models.output(theirs.eval(), inputs), rtol=1e-9, atol=1e-9)


def test_float16_base_keeps_the_adapter_in_float32_as_peft_does() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        ours = veneer.get_peft_model(models.make("llama", dtype=dtype), veneer.LoraConfig())
        theirs = peft.get_peft_model(models.make("llama", dtype=dtype), peft.LoraConfig())
        for model in (ours, theirs):
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        kept = veneer.get_peft_model(
            models.make("llama", dtype=dtype), veneer.LoraConfig(), autocast_adapter_dtype=False
        )
        assert {p.dtype for p in kept.parameters() if p.requires_grad} == {dtype}
