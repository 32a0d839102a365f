"""OLoRA, orthogonal, MiCA and LoftQ: against PEFT where it runs, and against the formula."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

import veneer
from tests import models
from tests.inits.with_peft import compare, gradients, pair
from veneer.core.errors import ConfigError, UsageError
from veneer.kernels.quantise import int8_rounded, nf4_rounded


def one_layer(init: Any, *, out: int = 64, inputs: int = 96, dtype: Any = torch.float32, **more: Any) -> Any:
    """An adapted Linear and its original weight."""
    torch.manual_seed(3)
    linear = nn.Linear(inputs, out, dtype=dtype)
    W = linear.weight.detach().clone()
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["0"], "init_lora_weights": init, **more}
    model = veneer.get_peft_model(nn.Sequential(linear), veneer.LoraConfig(**fields))
    return model.base_model.model[0], W, model


def test_olora_is_pefts() -> None:
    theirs, ours = pair("llama", "olora")
    compare(theirs, ours, 1e-5)
    x = models.batch("llama")
    torch.testing.assert_close(models.output(ours, x), models.output(theirs, x), rtol=1e-5, atol=1e-5)
    for name, (a, b) in gradients(theirs, ours, x).items():
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()), msg=name)


def test_olora_on_a_transposed_layer_decomposes_the_weight_and_not_its_transpose() -> None:
    """PEFT gives factors of the wrong shapes there."""
    base = models.make("gpt2")
    W = base.transformer.h[0].attn.c_attn.weight.detach().t().clone()
    config = veneer.LoraConfig(r=3, lora_alpha=3, target_modules=["c_attn"], init_lora_weights="olora")
    layer = veneer.get_peft_model(base, config).base_model.layers["transformer.h.0.attn.c_attn"]
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(layer.lora_B["default"].weight, Q[:, :3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.lora_A["default"].weight, R[:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mica_is_pefts_and_only_a_learns(kind: str) -> None:
    theirs, ours = pair(kind, "mica")
    compare(theirs, ours, 1e-4)
    x = models.batch(kind)
    assert torch.equal(models.output(ours, x), models.output(models.make(kind), x))
    learns = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert learns
    assert all(".lora_A." in name for name in learns)
    report = ours.match_report
    assert sum(target.parameters for target in report.targets) == sum(
        p.numel() for p in ours.parameters() if p.requires_grad
    )


def test_mica_on_an_embedding_freezes_b_too() -> None:
    model = veneer.get_peft_model(
        models.make("llama"), veneer.LoraConfig(r=3, target_modules=["embed_tokens"], init_lora_weights="mica")
    )
    layer = model.base_model.layers["model.embed_tokens"]
    U = torch.linalg.svd(layer.base_layer.weight.t().double(), full_matrices=False)[0]
    assert torch.equal(layer.lora_embedding_A["default"], torch.zeros(3, models.V))
    torch.testing.assert_close(
        layer.lora_embedding_B["default"].detach().double().abs(), U[:, -3:].abs(), rtol=0, atol=1e-4
    )
    assert not layer.lora_embedding_B["default"].requires_grad


def test_orthogonal_is_pefts_draw() -> None:
    linear = nn.Linear(96, 64)
    theirs = types.SimpleNamespace(
        r={"default": 4},
        in_features=96,
        out_features=64,
        get_base_layer=lambda: linear,
        lora_A={"default": nn.Linear(96, 4)},
        lora_B={"default": nn.Linear(4, 64)},
    )
    torch.manual_seed(11)
    LoraLayer.orthogonal_init(theirs, "default")
    config = veneer.LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal")
    torch.manual_seed(11)
    ours = veneer.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    for name in ("lora_A", "lora_B"):
        assert torch.equal(getattr(ours, name)["default"].weight, getattr(theirs, name)["default"].weight)
    assert ours.change("default").abs().max() < 1e-6
    assert ours.lora_A["default"].weight.abs().max() > 0.01


def test_orthogonal_needs_an_even_rank() -> None:
    with pytest.raises(ConfigError, match="needs an even rank"):
        one_layer("orthogonal", r=3)


# LoftQ


def reference_loftq(W: Tensor, rounded: Any, r: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper: Q and the product of the factors."""
    AB = torch.zeros_like(W)
    for _ in range(iterations):
        Q = rounded(W - AB)
        U, S, Vh = torch.linalg.svd(W - Q)
        AB = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
    return Q, AB


@pytest.mark.parametrize("alpha", [4, 8])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_the_papers_algorithm_with_the_scaling_in_it(bits: int, iterations: int, alpha: int) -> None:
    options = {"loftq_bits": bits, "loftq_iter": iterations}
    layer, W, model = one_layer("loftq", lora_alpha=alpha, loftq_config=options)
    Q, AB = reference_loftq(W, nf4_rounded if bits == 4 else int8_rounded, 4, iterations)
    p = layer.given("default")
    torch.testing.assert_close(p["initial_weight"], Q, rtol=1e-5, atol=1e-6)
    product = layer.scaling["default"] * p["lora_B.weight"] @ p["lora_A.weight"]
    torch.testing.assert_close(product, AB, rtol=1e-3, atol=1e-5)
    error = (Q + product - W).norm()
    assert error < (Q - W).norm()
    x = torch.randn(5, 96)
    torch.testing.assert_close(model(x), nn.functional.linear(x, Q + AB, layer.base_layer.bias), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.base_layer.weight, W)


def test_more_rounds_of_loftq_come_closer() -> None:
    errors = []
    for iterations in (1, 5):
        layer, _, _ = one_layer("loftq", r=16, lora_alpha=16, loftq_config={"loftq_iter": iterations})
        errors.append(float(layer.change("default").detach().norm()))
    assert errors[1] < errors[0]


def test_loftq_survives_its_file_and_the_base_comes_back(tmp_path: Any) -> None:
    layer, W, model = one_layer("loftq")
    x = torch.randn(5, 96)
    with torch.no_grad():
        layer.lora_A["default"].weight.add_(0.1)
    expected = model(x)
    model.save_pretrained(tmp_path)
    fresh = nn.Sequential(nn.Linear(96, 64))
    fresh[0].load_state_dict({"weight": W, "bias": layer.base_layer.bias})
    assert torch.equal(veneer.PeftModel.from_pretrained(fresh, tmp_path)(x), expected.detach())
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.unload()[0].weight, W)
    with pytest.raises(UsageError):
        veneer.PeftModel.from_pretrained(nn.Sequential(fresh[0]), tmp_path).save_pretrained(
            tmp_path, as_plain_lora=True
        )


def test_a_half_weight_stands_on_a_half_weight() -> None:
    layer, _, _ = one_layer("loftq", dtype=torch.bfloat16)
    assert layer.given("default")["initial_weight"].dtype == torch.bfloat16


bnb = pytest.importorskip("bitsandbytes")


class Holder(nn.Module):
    """A model that was quantised after it was saved."""

    base_model_prefix = "body"

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.body = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def quantised(self) -> Holder:
        for number, plain in enumerate(self.body):
            four = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=False)
            four.load_state_dict(plain.state_dict())
            self.body[number] = four.to("cpu")
        return self


@pytest.mark.parametrize("stored", ["file", "folder", "sharded", "without the prefix"])
def test_loftq_on_a_quantised_base_makes_up_for_its_error(stored: str, tmp_path: Any) -> None:
    import json

    from safetensors.torch import save_file

    x = torch.randn(7, 64)
    full = Holder()
    exact, state = full(x).detach(), {key: value.clone() for key, value in full.state_dict().items()}
    path = tmp_path
    if stored == "sharded":
        names = list(state)
        save_file({name: state[name] for name in names[:2]}, tmp_path / "one.safetensors")
        save_file({name: state[name] for name in names[2:]}, tmp_path / "two.safetensors")
        index = {name: "one.safetensors" if name in names[:2] else "two.safetensors" for name in names}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        kept = {name.removeprefix("body.") if "without" in stored else name: value for name, value in state.items()}
        save_file(kept, tmp_path / "model.safetensors")
        path = tmp_path / "model.safetensors" if stored == "file" else tmp_path
    config = veneer.LoraConfig(r=16, lora_alpha=4, target_modules=["0", "1"])
    model = veneer.get_peft_model(full.quantised(), config)
    before = (model(x) - exact).norm()
    veneer.replace_lora_weights_loftq(model, path)
    assert (model(x) - exact).norm() < 0.8 * before
    layer = model.base_model.layers["body.0"]
    missing = state["body.0.weight"] - layer.base.weight()
    U, S, Vh = torch.linalg.svd(missing)
    best = U[:, :16] * S[:16] @ Vh[:16]
    torch.testing.assert_close(layer.change("default"), best, rtol=1e-3, atol=1e-5)


def test_the_callback_decides_layer_by_layer(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    full = Holder()
    save_file(full.state_dict(), tmp_path / "model.safetensors")
    model = veneer.get_peft_model(full.quantised(), veneer.LoraConfig(r=4, target_modules=["0", "1"]))
    asked = []

    def keep(seen: nn.Module, name: str) -> bool:
        assert seen is model
        asked.append(name)
        return name == "body.1"

    veneer.replace_lora_weights_loftq(model, tmp_path, callback=keep)
    assert asked == ["body.0", "body.1"]
    changed = {path: bool(layer.change("default").any()) for path, layer in model.base_model.layers.items()}
    assert changed == {"body.0": False, "body.1": True}


def test_what_loftq_cannot_do_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="needs a PeftModel"):
        veneer.replace_lora_weights_loftq(Holder())
    _, _, plain = one_layer(True)
    with pytest.raises(UsageError, match="No layer of 'default' is quantised"):
        veneer.replace_lora_weights_loftq(plain)
    model = veneer.get_peft_model(Holder().quantised(), veneer.LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(UsageError, match="pass model_path"):
        veneer.replace_lora_weights_loftq(model)
    with pytest.raises(UsageError, match=r"has no model\.safetensors"):
        veneer.replace_lora_weights_loftq(model, tmp_path)
    with pytest.raises(ConfigError, match="is quantised already; use init_lora_weights=true and then"):
        veneer.get_peft_model(
            Holder().quantised(), veneer.LoraConfig(r=4, target_modules=["0"], init_lora_weights="loftq")
        )
    from safetensors.torch import save_file

    save_file({"body.0.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"\(64, 64\) in the model and \(3, 3\) in its files"):
        veneer.replace_lora_weights_loftq(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_starts_that_take_a_part_of_a_quantised_weight_leave_the_outputs(init: str) -> None:
    x = torch.randn(7, 64)
    base = Holder().quantised()
    before = base(x).detach()
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=init))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
