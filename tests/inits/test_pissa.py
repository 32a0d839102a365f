"""PiSSA against PEFT's own, and what a start that takes a part of W must keep: the base, other adapters, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from tests import models
from tests.inits.with_peft import TARGETS, compare, gradients, pair
from veneer.core.errors import AdapterFileError, ConfigError

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def adapted(init: Any, kind: str = "llama", **more: Any) -> veneer.PeftModel:
    config = veneer.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], "init_lora_weights": init, **more}
    )
    return veneer.get_peft_model(models.make(kind), config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"lora_alpha": 4}], ids=str)
def test_factors_outputs_and_gradients_are_pefts(kind: str, more: dict[str, Any]) -> None:
    theirs, ours = pair(kind, "pissa", **more)
    compare(theirs, ours, 1e-5)
    x = models.batch(kind)
    torch.testing.assert_close(models.output(ours, x), models.output(theirs, x), rtol=1e-5, atol=1e-5)
    for name, (a, b) in gradients(theirs, ours, x).items():
        # Signs of singular vectors are free, and the gradient's go with them.
        torch.testing.assert_close(a.abs(), b.abs(), rtol=1e-3, atol=1e-4 * float(b.abs().max()), msg=name)


@DTYPES
def test_half_weights_are_decomposed_in_float32(dtype: torch.dtype) -> None:
    linear = nn.Sequential(nn.Linear(12, 10, bias=False, dtype=dtype))
    W = linear[0].weight.detach().float()
    config = veneer.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], init_lora_weights="pissa")
    layer = veneer.get_peft_model(linear, config).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(B @ A, U[:, :3] * S[:3] @ Vh[:3], rtol=1e-4, atol=1e-5)
    assert A.dtype == torch.float32
    assert layer.base_layer.weight.dtype == dtype


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "orthogonal", "mica"])
def test_the_base_is_never_touched(init: str, tmp_path: Path) -> None:
    x = models.batch("llama")
    base = models.make("llama")
    before, state = models.output(base, x), {k: v.clone() for k, v in base.state_dict().items()}
    model = adapted(init)
    models.randomise(model)
    changed = models.output(model, x)
    with model.disable_adapter():
        assert torch.equal(models.output(model, x), before)
    model.add_adapter("plain", veneer.LoraConfig(r=2, target_modules=["k_proj", "q_proj"]))
    model.set_adapter("plain")
    assert torch.equal(models.output(model, x), before)
    model.set_adapter("default")
    assert torch.equal(models.output(model, x), changed)
    model.merge_adapter()
    torch.testing.assert_close(models.output(model, x), changed, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(models.output(model, x), changed)
    back = model.unload()
    assert torch.equal(models.output(back, x), before)
    assert all(torch.equal(value, state[key]) for key, value in back.state_dict().items())


def test_two_starts_on_one_model_add_up() -> None:
    x = models.batch("llama")
    base = models.output(models.make("llama"), x)
    model = adapted("pissa")
    model.add_adapter("other", veneer.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights="olora"))
    for name in (["default"], ["other"], ["default", "other"]):
        model.set_adapter(name)
        torch.testing.assert_close(models.output(model, x), base, rtol=1e-5, atol=1e-5)
    layer = model.base_model.layers["model.layers.0.self_attn.q_proj"]
    models.randomise(model)
    both = models.output(model, x)
    W = layer.base.weight() + layer.change("default") + layer.change("other")
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, W, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(models.output(model, x), both, rtol=1e-4, atol=1e-5)


def test_a_start_beside_a_merged_adapter_is_from_the_original_weight() -> None:
    model = adapted("gaussian")
    models.randomise(model)
    model.merge_adapter()
    config = veneer.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"], init_lora_weights="pissa")
    model.add_adapter("late", config)
    alone = adapted("pissa")
    for path, layer in model.base_model.layers.items():
        other = alone.base_model.layers[path].tensors("default")
        assert all(torch.equal(tensor, other[key]) for key, tensor in layer.tensors("late").items())


# Files


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_reads_our_file_and_we_read_pefts(init: str, tmp_path: Path) -> None:
    x = models.batch("llama")
    ours = adapted(init)
    models.randomise(ours)
    ours.save_pretrained(tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(models.make("llama"), str(tmp_path / "ours"))
    torch.testing.assert_close(models.output(read, x), models.output(ours.eval(), x), rtol=1e-4, atol=1e-5)

    theirs, _ = pair("llama", init)
    models.randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = veneer.PeftModel.from_pretrained(models.make("llama"), tmp_path / "theirs")
    torch.testing.assert_close(models.output(again, x), models.output(theirs.eval(), x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "orthogonal", "mica"])
def test_our_file_brings_its_start_along(init: str, tmp_path: Path) -> None:
    x = models.batch("llama")
    model = adapted(init).eval()
    models.randomise(model)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(models.make("llama"), tmp_path)
    assert torch.equal(models.output(again, x), models.output(model, x))


def test_a_start_that_a_file_does_not_hold_and_nobody_knows_is_refused(tmp_path: Path) -> None:
    theirs, _ = pair("llama", "pissa_niter_2")
    theirs.save_pretrained(str(tmp_path))
    base = models.make("llama")
    with pytest.raises(AdapterFileError, match="random draw, which PEFT repeats with another result"):
        veneer.PeftModel.from_pretrained(base, tmp_path)
    assert not hasattr(base.model.layers[0].self_attn.q_proj, "base_layer")
    config = veneer.PeftConfig.from_pretrained(tmp_path, init_lora_weights="pissa")
    veneer.PeftModel.from_pretrained(base, tmp_path, config=config)


def test_a_file_with_a_part_of_its_start_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapted("pissa").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(key for key in tensors if "initial_A" in key)
    save_file({key: value for key, value in tensors.items() if key != gone}, path)
    with pytest.raises(AdapterFileError, match=r"initial_A\.weight is missing"):
        veneer.PeftModel.from_pretrained(models.make("llama"), tmp_path)


def test_low_cpu_mem_usage_keeps_what_is_taken_from_the_weights(tmp_path: Path) -> None:
    x = models.batch("llama")
    saved = adapted("pissa").eval()
    models.randomise(saved)
    saved.save_pretrained(tmp_path)
    config = veneer.PeftConfig.from_pretrained(tmp_path, inference_mode=False)
    again = veneer.get_peft_model(models.make("llama"), config, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(models.output(again, x), models.output(models.make("llama"), x), rtol=1e-5, atol=1e-5)


PLAIN = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2, "down_proj": 3}},
    {"alpha_pattern": {"v_proj": 3}, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
]


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
@pytest.mark.parametrize("more", PLAIN, ids=str)
def test_as_plain_lora_is_the_same_on_the_original_base_in_peft(
    init: str, more: dict[str, Any], tmp_path: Path
) -> None:
    x = models.batch("llama")
    model = adapted(init, **more).eval()
    models.randomise(model)
    expected = models.output(model, x)
    model.save_pretrained(tmp_path / "a", as_plain_lora=True)
    model.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion=tmp_path / "not-needed")
    for folder in ("a", "b"):
        config = veneer.PeftConfig.from_pretrained(tmp_path / folder)
        assert config.init_lora_weights is True
        assert config.r == 8
        read = peft.PeftModel.from_pretrained(models.make("llama"), str(tmp_path / folder))
        torch.testing.assert_close(models.output(read, x), expected, rtol=1e-4, atol=1e-5)
        ours = veneer.PeftModel.from_pretrained(models.make("llama"), tmp_path / folder)
        torch.testing.assert_close(models.output(ours, x), expected, rtol=1e-4, atol=1e-5)


# What has no meaning


def test_more_rank_than_the_weight_has_is_refused_before_anything_changes() -> None:
    base = models.make("llama")
    with pytest.raises(ConfigError, match=r"'pissa' with rank 9 needs 9 components .* Linear is 8 x 16"):
        veneer.get_peft_model(base, veneer.LoraConfig(r=9, target_modules=["v_proj"], init_lora_weights="pissa"))
    assert type(base.model.layers[0].self_attn.v_proj) is nn.Linear


def test_groups_of_a_convolution_are_refused() -> None:
    base = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    with pytest.raises(ConfigError):
        veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_1", "olora"])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(3, 6, 3, padding=1), torch.randn(2, 3, 5, 5)),
        (nn.Embedding(9, 6), torch.arange(9)[None]),
    ],
    ids=["conv", "embedding"],
)
def test_other_layers_than_linear_ones(init: str, layer: nn.Module, x: Tensor) -> None:
    base = nn.Sequential(layer)
    before = base(x).detach()
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    held = model.base_model.layers["0"]
    assert held.change("default").norm() < 1e-5
    A, B = (held.tensors("default")[name] for name in held.base.factor_names)
    assert A.norm() > 0
    assert B.norm() > 0
