"""Parameters adapted by themselves: experts of real mixtures against PEFT, nesting, parametrised weights, refusals."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

import veneer
from tests.models import randomise
from veneer.core.errors import ConfigError, TargetError, UsageError

_SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
_MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**_SIZES, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def _qwen() -> nn.Module:
    config = transformers.Qwen2MoeConfig(**_SIZES, **_MOE, shared_expert_intermediate_size=8, decoder_sparse_step=1)
    return transformers.Qwen2MoeForCausalLM(config)


def _gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**_SIZES, num_local_experts=3, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config)


def _llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(
        **_SIZES, intermediate_size_mlp=12, num_local_experts=3, num_experts_per_tok=1, interleave_moe_layer_step=1
    )
    return transformers.Llama4ForCausalLM(config)


MIXTURES = {"mixtral": _mixtral, "qwen2": _qwen, "gpt-oss": _gpt_oss, "llama4": _llama4}
NAMES = ["experts.gate_up_proj", "experts.down_proj"]
mixtures = pytest.mark.parametrize("kind", MIXTURES)


def model(kind: str, seed: int = 7) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = MIXTURES[kind]()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def ids() -> Tensor:
    return torch.randint(3, 37, (2, 6), generator=torch.Generator().manual_seed(3))


def fields(**more: Any) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": NAMES} | more


def theirs(base: nn.Module, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base, peft.LoraConfig(**fields(**more)))
    randomise(made)
    return made


def ours(base: nn.Module, **more: Any) -> Any:
    made = veneer.get_peft_model(base, veneer.LoraConfig(**fields(**more)))
    randomise(made)
    return made


@mixtures
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"target_parameters": NAMES[:1], "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.down_proj": 5}},
    ],
    ids=["both", "one-rslora", "and-modules", "ranks"],
)
def test_outputs_gradients_and_files_are_pefts(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    x = ids()
    original = theirs(model(kind), **more)
    original.save_pretrained(tmp_path / "theirs")
    loaded = veneer.PeftModel.from_pretrained(model(kind), tmp_path / "theirs", is_trainable=True)
    gradients = []
    for adapted in (loaded, original):
        adapted(x, labels=x).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    torch.testing.assert_close(loaded(x).logits, original(x).logits, rtol=1e-4, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)

    loaded.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(model(kind), tmp_path / "ours")
    torch.testing.assert_close(back(x).logits, loaded(x).logits, rtol=1e-4, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(x).logits, original(x).logits, rtol=1e-3, atol=1e-4)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in model(kind).named_parameters()]


@mixtures
def test_a_fresh_adapter_changes_nothing_and_unload_gives_the_base_back(kind: str) -> None:
    # Frozen from the start: torch computes some products in another way when a weight learns.
    base, x = model(kind).requires_grad_(False), ids()
    frozen, before = base(x).logits, dict(base.named_parameters())
    adapted = veneer.get_peft_model(base, veneer.LoraConfig(**fields()))
    assert torch.equal(adapted(x).logits, frozen)
    randomise(adapted)
    assert not torch.equal(adapted(x).logits, frozen)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x).logits, frozen)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    after = dict(adapted.unload().named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_under_gradient_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        adapted, x = ours(model("mixtral")).train(), ids()
        if checkpointing:
            adapted.activation_checkpointing_enable()
            adapted.enable_input_require_grads()
        adapted(x, labels=x).loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_adapters_on_experts_are_combined_and_peft_reads_the_result(tmp_path: Path) -> None:
    adapted, x = ours(model("mixtral"), target_modules=["q_proj"]), ids()
    adapted.add_adapter("second", veneer.LoraConfig(**fields(r=2, target_parameters=NAMES[1:])))
    randomise(adapted, adapter="second", seed=5)
    adapted.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", "cat")
    adapted.set_adapter(["default", "second"])
    expected = adapted(x).logits
    adapted.set_adapter("both")
    torch.testing.assert_close(adapted(x).logits, expected, rtol=1e-4, atol=1e-5)
    adapted.save_pretrained(tmp_path, selected_adapters=["both"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(model("mixtral"), tmp_path / "both")
    torch.testing.assert_close(other(x).logits, expected, rtol=1e-4, atol=1e-5)


class Pair(nn.Module):
    """A module with two stacks of matrices and one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 5))
        self.single = nn.Parameter(torch.randn(2, 4))
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ni,eoi->neo", x, self.up)
        return F.linear(torch.einsum("neo,eio->ni", h, self.down) * self.scale, self.single)


def pair(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), Pair()).double()


def features() -> Tensor:
    return torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("order", list(itertools.permutations(["one", "two", "both"])), ids=",".join)
def test_adapters_on_different_parameters_come_and_go_in_any_order(order: tuple[str, ...], tmp_path: Path) -> None:
    configs = {"one": ["1.up"], "two": ["1.single"], "both": ["1.down", "1.up", "1.single"]}
    base, x = pair(), features()
    frozen = base(x)
    adapted = veneer.get_peft_model(base, veneer.LoraConfig(**fields(target_parameters=["1.down"])), "first")
    alone = {}
    for name in order:
        adapted.add_adapter(name, veneer.LoraConfig(**fields(target_parameters=configs[name])))
        randomise(adapted, adapter=name)
    for name in order:
        adapted.set_adapter(name)
        alone[name] = adapted(x)
        adapted.save_pretrained(tmp_path, selected_adapters=[name])
        fresh = veneer.PeftModel.from_pretrained(pair(), tmp_path / name)
        torch.testing.assert_close(fresh(x), alone[name], rtol=1e-6, atol=1e-6)
    for number, name in enumerate(order):
        adapted.set_adapter(name)
        torch.testing.assert_close(adapted(x), alone[name], rtol=1e-12, atol=1e-12)
        adapted.set_adapter("first")
        adapted.delete_adapter(name)
        for left in order[number + 1 :]:
            adapted.set_adapter(left)
            torch.testing.assert_close(adapted(x), alone[left], rtol=1e-12, atol=1e-12)
    adapted.set_adapter("first")
    torch.testing.assert_close(adapted(x), frozen, rtol=0, atol=0)
    wrapper = adapted.base_model.model[1]
    assert wrapper.base_layer is adapted.unload()[1]


def test_names_nest_as_in_peft(tmp_path: Path) -> None:
    names = ["1.down", "1.single", "1.up"]
    mine, original = ours(pair(), target_parameters=names), theirs(pair(), target_parameters=names)
    learning = {name: tuple(p.shape) for name, p in original.named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in mine.named_parameters() if p.requires_grad} == learning
    original.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(pair(), tmp_path)
    torch.testing.assert_close(loaded(features()), original(features()))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_single_expert(is_transposed: bool) -> None:
    """Against the closed form; PEFT adds the transpose there when the layout is (1, in, out)."""
    base = pair()
    base[1].up = nn.Parameter(torch.randn(1, 5, 4, dtype=torch.float64))
    base[1].is_transposed = is_transposed
    adapted = ours(base, target_parameters=["1.up"])
    wrapper = adapted.base_model.model[1]
    change = wrapper.lora_B["default"].weight @ wrapper.lora_A["default"].weight * 2.0
    expected = base[1].base_layer.up[0] + (change.t() if is_transposed else change)
    torch.testing.assert_close(wrapper.up[0], expected, rtol=1e-12, atol=1e-12)


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, W: Tensor) -> Tensor:
        return 2 * W


def parametrised() -> nn.Sequential:
    base = pair()
    parametrize.register_parametrization(base[1], "up", Doubled())
    return base


@pytest.mark.parametrize("names", [["1.up"], ["1.up", "1.down"]], ids=["one", "two"])
def test_a_parametrised_parameter_keeps_its_parametrisation_and_one_update(names: list[str]) -> None:
    """PEFT adds the update again at every call there."""
    base, x = parametrised(), features()
    adapted = ours(base, target_parameters=names)
    written = pair()
    with torch.no_grad():
        written[1].up.copy_(2 * written[1].up)
        for name in names:
            layer = adapted.base_model.layers[name]
            leaf = name.removeprefix("1.")
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            out, inputs = written[1].get_parameter(leaf).shape[1:]
            change = torch.einsum("ore,eri->eoi", B.view(out, -1, 3), A.view(3, -1, inputs)) * 2.0
            written[1].get_parameter(leaf).add_(change)
    for _ in range(3):
        torch.testing.assert_close(adapted(x), written(x), rtol=1e-9, atol=1e-9)
    with parametrize.cached():
        torch.testing.assert_close(adapted(x), written(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(adapted.unload()(x), parametrised()(x))
    assert parametrize.is_parametrized(base[1], "up")


@pytest.mark.parametrize("names", [["1.up"], ["1.up", "1.down"]], ids=["one", "two"])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside-others"])
def test_merging_into_a_parametrised_parameter(names: list[str], others: bool) -> None:
    """For a while it is a fixed value, and the parametrisation comes back; for good it is a plain parameter."""
    base, x = parametrised(), features()
    if others:
        parametrize.register_parametrization(base[1], "single", Doubled())
    twin = copy.deepcopy(base)
    adapted = ours(base, target_parameters=names)
    adapted.add_adapter("second", veneer.LoraConfig(**fields(target_parameters=["1.up"])))
    randomise(adapted, adapter="second", seed=5)
    before, frozen = adapted(x), twin(x)
    lists = dict(base[1].parametrizations.items())
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), before, rtol=1e-12, atol=1e-12)
    adapted.unmerge_adapter()
    adapted.set_adapter(["default", "second"])
    both = adapted(x)
    adapted.merge_adapter(["default"])
    torch.testing.assert_close(adapted(x), both, rtol=1e-12, atol=1e-12)
    adapted.base_model.to(torch.float32)
    adapted.unmerge_adapter()
    assert dict(base[1].parametrizations.items()) == lists
    assert {p.dtype for p in lists["up"].parameters()} == {torch.float32}
    adapted.base_model.to(torch.float64)
    adapted.set_adapter("default")
    expected = adapted(x)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-6, atol=1e-6)
    assert type(merged[1]._parameters["up"]) is nn.Parameter
    assert parametrize.is_parametrized(merged[1]) == others
    assert {name for name, _ in merged.named_parameters() if "parametrizations" in name} == (
        {"1.parametrizations.single.original"} if others else set()
    )
    # A copy from before computes as it did.
    assert torch.equal(twin(x), frozen)


def test_a_forward_that_was_replaced_on_the_instance_is_run() -> None:
    """As accelerate's hooks do: it is bound to the module itself."""
    base, x = pair(), features()
    adapted = ours(base, target_parameters=["1.up"])
    expected = adapted(x)
    raw = base[1].base_layer
    own, calls = raw.forward, []
    raw.forward = lambda x: (calls.append(1), own(x))[1]
    torch.testing.assert_close(adapted(x), expected)
    assert calls == [1]
    assert type(raw._parameters["up"]) is nn.Parameter


def test_a_weight_of_a_linear_layer() -> None:
    base, x = pair(), features()
    adapted = ours(base, target_parameters=["0.weight"])
    wrapper = base[0]
    W = wrapper.base_layer.weight + wrapper.lora_B["default"].weight @ wrapper.lora_A["default"].weight * 2.0
    torch.testing.assert_close(wrapper(x), F.linear(x, W, wrapper.base_layer.bias), rtol=1e-12, atol=1e-12)
    assert [(t.path, t.kind) for t in adapted.match_report.targets] == [("0.weight", "parameter")]


@pytest.mark.parametrize(
    ("more", "error", "reason"),
    [
        ({"lora_dropout": 0.1}, ConfigError, "lora_dropout"),
        ({"lora_bias": True}, ConfigError, "lora_bias"),
        ({"use_dora": True}, ConfigError, "plain LoRA|use_dora"),
        ({"target_parameters": ["1.dwon"]}, TargetError, "'1.down'"),
        ({"target_parameters": ["scale"]}, TargetError, "1 dimensions"),
        ({"target_parameters": "1.down"}, ConfigError, "expected a list"),
        ({"target_modules": ["0"], "target_parameters": ["0.weight"]}, TargetError, "target_modules=\\[\\]"),
        ({"exclude_modules": ["1"]}, TargetError, "exclude_modules"),
        ({"layers_to_transform": 1}, TargetError, "layers_to_transform"),
        ({"target_parameters": None}, ConfigError, "empty list"),
        ({"target_parameters": []}, ConfigError, "empty list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_has_no_meaning_is_refused(more: dict[str, Any], error: type[Exception], reason: str) -> None:
    base = pair()
    with pytest.raises(error, match=reason):
        veneer.get_peft_model(base, veneer.LoraConfig(**(fields(target_parameters=["1.down"]) | more)))
    assert type(base[1]) is Pair


@pytest.mark.parametrize("first", [True, False])
def test_a_module_and_its_parameter_in_two_adapters_are_refused(first: bool) -> None:
    whole, part = fields(target_modules=["0"], target_parameters=None), fields(target_parameters=["0.weight"])
    one, other = (whole, part) if first else (part, whole)
    adapted = veneer.get_peft_model(pair(), veneer.LoraConfig(**one))
    with pytest.raises(UsageError, match="takes the module whole"):
        adapted.add_adapter("second", veneer.LoraConfig(**other))
    assert list(adapted.peft_config) == ["default"]


def test_defaults_of_the_model_type_come_along_unless_told() -> None:
    targets = ours(model("mixtral"), target_modules=None).match_report.targets
    assert {t.path.split(".")[-1] for t in targets if t.kind == "linear"} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {t.path.split(".")[-1] for t in targets if t.kind == "parameter"} == {"gate_up_proj", "down_proj"}
    assert {t.kind for t in ours(model("gpt-oss"), target_modules=None).match_report.targets} == {"parameter"}
