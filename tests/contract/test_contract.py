"""What every variant keeps on every base from every start. The three rooms are read, nothing is named here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.contract.bases import CASES, BaseCase, all_cases, cases_of
from tests.contract.evidence import prepare
from veneer.core import registry
from veneer.core.base import AbstractBase, WeightBase
from veneer.core.errors import ConfigError, MergeError
from veneer.core.init import AbstractInit
from veneer.core.variant import AbstractVariant, variant_of

VARIANTS, INITS = registry.names("variants"), registry.names("inits")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
R, ALPHA = 2, 7


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module, case: BaseCase) -> None:
        super().__init__()
        self.layer = layer
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        return self.case.call(self.layer, x)


def config(variant: str, init: str = "kaiming", **more: Any) -> Any:
    """The variant's config, with those of the usual fields that it has.

    Raises:
        ConfigError: the variant refuses the start, or has none but its own.
    """
    found = registry.load("variants", variant).Variant
    known = {f.name for f in fields(found.config_class)}
    named = f"{init}_2" if init.endswith("_niter") else init
    usual = {"r": R, "lora_alpha": ALPHA, "target_modules": ["layer"], "init_lora_weights": named}
    if "init_r" in known:
        usual |= {"r": 8, "init_r": R, "target_r": R - 1, "total_step": 10}
    if "init_lora_weights" not in known and init != "kaiming":
        raise ConfigError(f"{found.config_class.__name__} starts in its own way.")
    if "lora_dropout" in more and "lora_dropout" not in known:
        more[next(name for name in known if name.endswith("_dropout"))] = more.pop("lora_dropout")
    given = {name: value for name, value in usual.items() if name in known} | dict(found.options) | more
    return found.config_class(**given)


def base_model(base: str, case: str, dtype: torch.dtype) -> tuple[Holder, Tensor, BaseCase]:
    found = cases_of(base)[case]
    torch.manual_seed(5)
    model, x = Holder(found.quantise(found.module().to(dtype)), found), found.inputs()
    return model, x.to(dtype) if x.is_floating_point() else x, found


def fitted(config: Any, case: BaseCase) -> Any:
    """The config with what a case needs; AdaLoRA's rank has another name.

    Raises:
        ConfigError: this kind of config has no such field.
    """
    needed = dict(case.fields)
    if "r" in needed and hasattr(config, "init_r"):
        needed["init_r"] = needed.pop("r")
    return replace(config, **needed)


def adapt(model: nn.Module, config: Any, *names: str) -> veneer.PeftModel:
    config = fitted(config, model.case)
    prepare(model, config, model.case.inputs)
    adapted = veneer.get_peft_model(model, config, names[0] if names else "default")
    for name in names[1:]:
        adapted.add_adapter(name, config)
    return adapted


@cache
def refusal(variant: str, base: str, case: str, init: str = "kaiming", **more: Any) -> str | None:
    """Why a variant cannot be on a base, or not from a start, or None; it says so before anything is touched."""
    if base not in CASES:
        return None  # its tests fail and say what is missing
    model, _, _ = base_model(base, case, torch.float32)
    try:
        adapt(model, config(variant, init, **more))
    except ConfigError as refused:
        assert type(model.layer).__name__ != "AdaptedLayer"
        return str(refused)
    return None


@cache
def has_place(variant: str, base: str, case: str) -> bool:
    """Whether the variant's update is a change of W there."""
    if base not in CASES:
        return True
    layer = adapt(base_model(base, case, torch.float32)[0], config(variant)).base_model.model.layer
    try:
        layer.change("default")
    except MergeError:
        return False
    return True


@cache
def accepts(variant: str, init: str) -> bool:
    """Whether a variant takes a start."""
    try:
        config(variant, init)
    except ConfigError:
        return False
    return True


def _each(combinations: list[tuple[str, ...]], *names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(names, [pytest.param(*found, id="-".join(found)) for found in combinations])


def _on(exact: bool | None) -> list[tuple[str, str, str]]:
    """Every variant on every base that it can be on."""
    every = [(v, b, c) for v in VARIANTS for b, c in all_cases(exact)]
    return [found for found in every if refusal(*found) is None]


WHERE = ("variant", "base", "case")
STARTED = [(*found, init) for found in _on(None) for init in INITS if accepts(found[0], init)]

combinations, exact_combinations = _each(_on(None), *WHERE), _each(_on(True), *WHERE)
quantised_combinations = _each(_on(False), *WHERE)
"""Those whose W is stored in fewer bits than it is read in; what is special about them is in test_quantised.py."""
placed_combinations = _each([found for found in _on(True) if has_place(*found)], *WHERE)
"""Those whose update is a change of W; others are held against plain torch in their base's own tests."""
homeless_combinations = _each([found for found in _on(True) if not has_place(*found)], *WHERE)
dropping_combinations = _each([found for found in _on(True) if refusal(*found, lora_dropout=0.5) is None], *WHERE)
undropping_combinations = _each([found for found in _on(True) if refusal(*found, lora_dropout=0.5)], *WHERE)
started_combinations = _each([found for found in STARTED if refusal(*found) is None], *WHERE, "init")
refused_starts = _each([found for found in STARTED if refusal(*found)], *WHERE, "init")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def move(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter tensor values of its own, so that the update is not zero."""
    generator = torch.Generator().manual_seed(seed)
    layer = model.base_model.model.layer
    with torch.no_grad():
        for name in sorted(layer.specs):
            for key, parameter in layer.tensors(name).items():
                # A weight to stand on that no file holds is what the start made it.
                if not layer.specs[name][key].saved:
                    continue
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def options(variant: str, layer: nn.Module) -> Iterator[dict[str, Any]]:
    """The plain config, and with each kind of bias where there is one to learn."""
    yield {}
    if getattr(layer, "bias", None) is not None:
        found = registry.load("variants", variant).Variant
        yield {"bias": found.config_class.own_biases}
        if "lora_bias" in {f.name for f in fields(found.config_class)} and not found.options:
            yield {"lora_bias": True}


def truth(model: veneer.PeftModel, x: Tensor, found: BaseCase) -> Tensor:
    """The plain formula: the module in plain torch, with the merged weight."""
    layer = model.base_model.model.layer
    W_OI = layer.base.weight() + layer.change("default")
    return found.plain(layer.base_layer, found.dense(x).to(W_OI.dtype), W_OI, merged_bias(layer))


@pytest.mark.parametrize(
    ("room", "attribute", "parent"),
    [("variants", "Variant", AbstractVariant), ("bases", "Base", AbstractBase), ("inits", "Init", AbstractInit)],
)
def test_each_file_defines_its_one_final_class(room: str, attribute: str, parent: type) -> None:
    for name in registry.names(room):
        found = getattr(registry.load(room, name), attribute)
        assert parent in found.__mro__
        assert inspect.isabstract(found.__mro__[1])
        assert found.__final__
        assert not found.__abstractmethods__


def test_each_variant_is_selected_by_its_own_config() -> None:
    for name in VARIANTS:
        assert type(variant_of(config(name))) is registry.load("variants", name).Variant
        again = veneer.PeftConfig.from_dict(config(name).to_dict())
        assert again == config(name, peft_version=again.peft_version)


def test_refusals_are_sentences() -> None:
    reasons = {refusal(variant, base, case) for variant in VARIANTS for base, case in all_cases(None)} - {None}
    assert all(reason.endswith((".", "?")) and "\n" not in reason for reason in reasons)


@refused_starts
def test_a_start_that_has_no_meaning_is_refused(variant: str, base: str, case: str, init: str) -> None:
    """In one sentence that names the start, or says that only plain starts will do; nothing was touched."""
    reason = refusal(variant, base, case, init)
    assert reason.endswith(".")
    assert "\n" not in reason
    assert f"init_lora_weights='{init}" in reason or "with a plain start only" in reason


@started_combinations
def test_start(variant: str, base: str, case: str, init: str) -> None:
    """An identity start leaves the outputs bit-identical, in training too; any other start changes them."""
    for dtype in DTYPES:
        check_start(variant, base, case, init, dtype)


def check_start(variant: str, base: str, case: str, init: str, dtype: torch.dtype) -> None:
    model, x, found = base_model(base, case, dtype)
    frozen = {training: model.train(training)(x) for training in (False, True)}
    droppable = {} if issubclass(registry.load("bases", base).Base, WeightBase) else {"lora_dropout": 0.3}
    adapted = adapt(model, config(variant, init, **droppable))
    identity = registry.load("inits", init).Init.identity
    for training in (False, True):
        before, after = frozen[training], adapted.train(training)(x)
        if identity != "rounded":
            assert torch.equal(after, before) == (identity == "exact")
        assert after.dtype == before.dtype
        if identity == "rounded" and not training:
            # Dropout drops a part of what the start took out of W. That part is rounded by its own size, which may be
            # larger than the output's.
            sizes = torch.maximum(before.abs().double(), sensitivity(adapted, x, found)).max()
            assert ((after - before).abs() <= 16 * torch.finfo(dtype).eps * sizes).all()


@started_combinations
def test_start_is_drawn_from_torchs_seed(variant: str, base: str, case: str, init: str) -> None:
    drawn = []
    for seed in (1, 1, 2):
        model, _, _ = base_model(base, case, torch.float32)
        torch.manual_seed(seed)
        layer = adapt(model, config(variant, init)).base_model.model.layer
        drawn.append(torch.cat([p.detach().flatten() for p in layer.tensors("default").values()]))
    assert torch.equal(drawn[0], drawn[1])
    # A config without that field starts in its own way, which need not draw anything.
    own = {f.name for f in fields(registry.load("variants", variant).Variant.config_class)}
    if registry.load("inits", init).Init.random and "init_lora_weights" in own:
        assert not torch.equal(drawn[0], drawn[2])


def sensitivity(model: veneer.PeftModel, x: Tensor, found: BaseCase) -> Tensor:
    """How far the output moves, to first order, when everything it is computed from moves by its own size.

    The sum over all inputs p (the adapter's tensors, the weight, the bias, x) of ``|dy/dp| |p|``, in float64 and from
    the plain formula: so cancellation cannot hide behind a small output.
    """
    exact = copy.deepcopy(model).double()
    dense = found.dense(x).double()
    layer = exact.base_model.model.layer
    inputs = {**{f"base_layer.{n}": p for n, p in layer.base_layer.named_parameters()}, **layer.tensors("default")}
    names = list(inputs)

    def output(dense: Tensor, *values: Tensor) -> Tensor:
        for name, value in zip(names, values, strict=True):
            inputs[name].data = value.detach()
        return found.plain(layer.base_layer, dense, layer.base.weight() + layer.change("default"), merged_bias(layer))

    values = [dense, *(p.detach().clone() for p in inputs.values())]
    total = torch.zeros_like(output(*values))
    for number, value in enumerate(values):
        for element in range(value.numel()):
            step = torch.zeros_like(value).flatten()
            step[element] = 1e-4 * value.flatten()[element]
            there, back = list(values), list(values)
            there[number], back[number] = value + step.view_as(value), value - step.view_as(value)
            total += (output(*there) - output(*back)).abs() / 2e-4
    return total.detach()


def merged_bias(layer: nn.Module, adapter: str = "default") -> Tensor | None:
    name, variant = layer.base.bias_name(), layer.variants[adapter]
    bias = None if name is None else getattr(layer.base_layer, name)
    return variant.merged_bias(layer.base, layer.given(adapter), bias, scaling=layer.scaling[adapter])


@placed_combinations
@dtypes
def test_merged_is_unmerged_within_rounding(variant: str, base: str, case: str, dtype: torch.dtype) -> None:
    """The bound is that of standard error analysis, with u the dtype's unit roundoff.

    On its way from the parameters to the output no term is rounded to the dtype more than six times: A, B, A x and
    the two sums when unmerged or W' and the sum when merged. Each sum of n terms adds n roundings of the
    accumulator.
    """
    for option in options(variant, base_model(base, case, dtype)[0].layer):
        model, x, found = base_model(base, case, dtype)
        adapted = adapt(model, config(variant, **option)).eval()
        move(adapted)
        layer = adapted.base_model.model.layer
        S = sensitivity(adapted, x, found)
        terms = layer.base.shape()[1] + R + 2
        accumulator = torch.finfo(torch.float32).eps / 2
        bound = (6 * torch.finfo(dtype).eps / 2 + 2 * terms * accumulator) * S + terms * torch.finfo(dtype).tiny

        with torch.no_grad():
            unmerged, frozen = adapted(x), model.case.call(layer.base_layer, x)
            adapted.merge_adapter()
            merged = adapted(x)
        assert merged.dtype == unmerged.dtype == dtype
        assert ((merged.double() - unmerged.double()).abs() <= bound).all()
        assert not torch.equal(merged, frozen)


@placed_combinations
@dtypes
def test_unmerge_gives_back_the_very_tensors(variant: str, base: str, case: str, dtype: torch.dtype) -> None:
    for option in options(variant, base_model(base, case, dtype)[0].layer):
        model, x, _ = base_model(base, case, dtype)
        before = {name: (p, p.clone(), p.data_ptr()) for name, p in model.layer.named_parameters()}
        adapted = adapt(model, config(variant, **option)).eval()
        move(adapted)
        unmerged = adapted(x)
        adapted.merge_adapter()
        adapted.unmerge_adapter()
        assert torch.equal(adapted(x), unmerged)
        after = dict(adapted.unload().layer.named_parameters())
        for name, (parameter, value, address) in before.items():
            assert after[name] is parameter
            assert after[name].data_ptr() == address
            assert torch.equal(after[name], value)


@homeless_combinations
def test_an_update_without_a_place_in_the_weight_is_not_merged(variant: str, base: str, case: str) -> None:
    model, x, _ = base_model(base, case, torch.float32)
    adapted = adapt(model, config(variant))
    move(adapted)
    before = adapted(x)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(MergeError, match="has no place in the weight"):
            merge()
        assert torch.equal(adapted(x), before)


@started_combinations
def test_save_and_load(variant: str, base: str, case: str, init: str, tmp_path: Path) -> None:
    """Every start in float32; the plain one in half precision too, which is all that another dtype changes."""
    for dtype in DTYPES if init == "kaiming" else DTYPES[:1]:
        check_file(variant, base, case, init, dtype, tmp_path / str(dtype))


def check_file(variant: str, base: str, case: str, init: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for number, option in enumerate(options(variant, base_model(base, case, dtype)[0].layer)):
        model, x, _ = base_model(base, case, dtype)
        adapted = adapt(model, config(variant, init, **option)).eval()
        move(adapted)
        adapted.save_pretrained(tmp_path / str(number))
        again = veneer.PeftModel.from_pretrained(base_model(base, case, dtype)[0], tmp_path / str(number))
        with torch.no_grad():
            # Attention computes in another way while it learns.
            assert torch.equal(again(x), adapted(x))
        theirs, ours = again.state_dict(), adapted.state_dict()
        assert theirs.keys() == ours.keys()
        for key, tensor in ours.items():
            assert theirs[key].dtype == tensor.dtype
            assert torch.equal(theirs[key], tensor)
        loaded, saved = again.peft_config["default"], adapted.peft_config["default"]
        assert {**loaded.to_dict(), "inference_mode": None} == {**saved.to_dict(), "inference_mode": None}


@placed_combinations
def test_gradients_are_those_of_the_plain_formula(variant: str, base: str, case: str) -> None:
    """In float64: of the adapter's tensors, of trained biases, and of the input."""
    for option in options(variant, base_model(base, case, torch.float64)[0].layer):
        model, x, found = base_model(base, case, torch.float64)
        adapted = adapt(model, config(variant, **option))
        move(adapted)
        wanted = [p for p in adapted.parameters() if p.requires_grad]
        specs = [spec for layer in adapted.base_model.layers.values() for spec in layer.specs["default"].values()]
        assert len(wanted) == sum(spec.trainable for spec in specs) + ("bias" in option)
        if x.is_floating_point():
            x.requires_grad_()
            wanted.append(x)
        y, expected = adapted(x), truth(adapted, x, found)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        weights = torch.randn_like(y)
        ours = torch.autograd.grad((y * weights).sum(), wanted)
        theirs = torch.autograd.grad((expected * weights).sum(), wanted)
        for gradient, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@combinations
@dtypes
def test_dtypes_and_devices_are_kept(variant: str, base: str, case: str, dtype: torch.dtype) -> None:
    model, x, _ = base_model(base, case, dtype)
    on_meta = copy.deepcopy(model)
    before = {name: (p.dtype, p.device) for name, p in model.layer.named_parameters()}
    adapted = adapt(model, config(variant)).base_model
    layer = adapted.model.layer
    now = {name: adapted.original(f"layer.{name}") for name in before}
    assert {name: (p.dtype, p.device) for name, p in now.items()} == before
    # A quantised weight may be read in float32 whatever is computed in.
    _, own = layer.base.placement()
    assert own == dtype or not layer.base.exact
    # Halves are too coarse to train in: the thin factors are kept in float32, unless told otherwise.
    wide = torch.float32 if own in HALVES else own
    assert {p.dtype for p in layer.tensors("default").values()} == {wide}
    assert model(x).dtype == dtype
    narrow, _, found = base_model(base, case, dtype)
    chosen = replace(config(variant), **found.fields)
    same = veneer.get_peft_model(narrow, chosen, autocast_adapter_dtype=False)
    assert {p.dtype for p in same.base_model.model.layer.tensors("default").values()} == {own}
    if not layer.base.exact:
        return  # bitsandbytes' tensors cannot be moved to the meta device.
    there = adapt(on_meta.to("meta"), config(variant)).base_model.model.layer
    assert {p.device.type for p in there.tensors("default").values()} == {"meta"}


@placed_combinations
@dtypes
def test_backward_in_every_dtype(variant: str, base: str, case: str, dtype: torch.dtype) -> None:
    """Gradients come in their parameter's dtype and are within the dtype's reach of the float64 ones."""
    model, x, _ = base_model(base, case, dtype)
    adapted = adapt(model, config(variant))
    move(adapted)
    exact, _, found = base_model(base, case, torch.float64)
    exact = adapt(exact, config(variant))
    move(exact)
    with torch.no_grad():
        for (_, wide), (_, narrow) in zip(
            exact.base_model.model.layer.named_parameters(), model.layer.named_parameters(), strict=True
        ):
            wide.copy_(narrow)
    y = adapted(x)
    (y.double().square().sum()).backward()
    reference = truth(exact, x.double() if x.is_floating_point() else x, found)
    reference.square().sum().backward()
    learning = {name: p for name, p in model.layer.tensors("default").items() if p.requires_grad}
    assert learning
    for name, parameter in learning.items():
        assert parameter.grad.dtype == parameter.dtype
        expected = exact.base_model.model.layer.tensors("default")[name].grad
        # Every rounding is relative to the largest values that are summed; there are fewer than 32 of them.
        scale = expected.abs().max() * 32
        assert (parameter.grad.double() - expected).abs().max() <= torch.finfo(dtype).eps * scale


@dropping_combinations
def test_dropout_in_training_only(variant: str, base: str, case: str) -> None:
    model, x, _ = base_model(base, case, torch.float64)
    without = adapt(base_model(base, case, torch.float64)[0], config(variant))
    adapted = adapt(model, config(variant, lora_dropout=0.5))
    move(adapted)
    move(without)
    assert torch.equal(adapted.eval()(x), without.eval()(x))
    adapted.train()
    draws = torch.stack([adapted(x).detach() for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    # The average is unbiased: within five standard errors of the output without dropout.
    error = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - without(x)).abs() <= 5 * error + 1e-12).all()


@undropping_combinations
def test_dropout_that_has_no_meaning_is_refused(variant: str, base: str, case: str) -> None:
    assert "has no input of its own to drop" in refusal(variant, base, case, lora_dropout=0.5)


@exact_combinations
def test_several_active_adapters_add_up(variant: str, base: str, case: str) -> None:
    model, x, found = base_model(base, case, torch.float64)
    frozen = model(x)
    adapted = adapt(model, config(variant), "one", "two", "three").eval()
    move(adapted)
    alone = {}
    for name in ("one", "two", "three"):
        adapted.set_adapter(name)
        alone[name] = adapted(x) - frozen
    adapted.set_adapter(["one", "three"])
    expected = frozen + alone["one"] + alone["three"]
    layer = model.layer
    if isinstance(layer.base, WeightBase):
        # There the weights add up, and the outputs are more than linear in them.
        W_OI = layer.base.weight() + layer.change("one") + layer.change("three")
        expected = found.plain(layer.base_layer, found.dense(x), W_OI, merged_bias(layer, "one"))
    torch.testing.assert_close(adapted(x), expected, rtol=1e-12, atol=1e-12)
    unmerged = adapted(x)
    if not has_place(variant, base, case):
        return
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), unmerged, rtol=1e-12, atol=1e-12)
    adapted.unmerge_adapter()
    assert torch.equal(adapted(x), unmerged)


@combinations
@dtypes
def test_disabled_is_the_base_bit_for_bit(variant: str, base: str, case: str, dtype: torch.dtype) -> None:
    model, x, _ = base_model(base, case, dtype)
    # Frozen, as it is under the adapter: torch computes attention in another way when its weights learn.
    frozen = model.requires_grad_(False)(x)
    adapted = adapt(model, config(variant))
    move(adapted)
    changed = adapted(x)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), frozen)
    assert torch.equal(adapted(x), changed)
    assert not torch.equal(changed, frozen)
    assert torch.equal(adapted.unload()(x), frozen)


def test_lora_bias_without_a_bias_to_merge_into_is_refused() -> None:
    model, x, _ = base_model("linear", "no-bias", torch.float32)
    adapted = adapt(model, config("lora", lora_bias=True))
    move(adapted)
    before = adapted(x)
    with pytest.raises(MergeError, match="no bias"):
        adapted.merge_adapter()
    with pytest.raises(MergeError, match="no bias"):
        adapted.merge_and_unload()
    assert torch.equal(adapted(x), before)
