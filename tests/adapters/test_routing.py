"""Every row of a mixed batch is what it is alone with its adapter active; gradients are the sum of those runs."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import models
from tests.contract.test_contract import adapt, base_model, combinations, config, move
from veneer import LoraConfig, UsageError, get_peft_model
from veneer.adapters import routing

NAMES = ["a", "__base__", "b", "a"]
TARGETS = {
    "bert": {"task_type": "SEQ_CLS"},
    "distilbert": {"task_type": "SEQ_CLS"},
    "vit": {"task_type": "IMAGE_CLASSIFICATION"},
}


def two(kind: str = "llama", **fields: Any) -> Any:
    """A model with adapters "a" and "b" of different ranks, moved off their start."""
    model = get_peft_model(models.make(kind), LoraConfig(target_modules="all-linear", r=3, **fields), "a")
    model.add_adapter("b", LoraConfig(target_modules="all-linear", r=2, lora_alpha=5, **fields))
    for seed, name in enumerate("ab"):
        models.randomise(model, adapter=name, seed=seed)
    return model.eval()


def using(model: Any, name: str) -> Any:
    return model.disable_adapter() if name == "__base__" else model.adapter(name)


def row(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    return {key: value[number : number + 1] for key, value in inputs.items()}


def alone(model: Any, inputs: dict[str, Any], names: Sequence[str] = NAMES) -> Tensor:
    """Each row in a batch of its own, with its adapter active."""
    outputs = []
    for number, name in enumerate(names):
        with using(model, name):
            outputs.append(models.output(model, row(inputs, number)))
    return torch.cat(outputs)


def mixed(model: Any, inputs: dict[str, Any], names: Sequence[str] = NAMES) -> Tensor:
    return models.output(model, {**inputs, "adapter_names": list(names)})


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# Every variant on every base


@combinations
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_each_row_is_what_it_is_alone(variant: str, base: str, case: str, mode: str) -> None:
    model, x, _ = base_model(base, case, torch.float32)
    x = torch.cat([x, x.flip(0)])[:4]
    adapted = adapt(model, config(variant), "a", "b")
    move(adapted)
    adapted.train(mode == "training")
    adapted.set_requires_grad(["a", "b"])
    with torch.set_grad_enabled(mode == "training"):
        parts = []
        for number, name in enumerate(NAMES):
            with using(adapted, name):
                parts.append(adapted(x[number : number + 1]))
        expected = torch.cat(parts)
        found = adapted(x, adapter_names=NAMES)
        torch.testing.assert_close(found, expected)
        weight = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
        if mode == "training":
            (expected * weight).sum().backward()
            right = gradients(adapted)
            (found * weight).sum().backward()
            here = gradients(adapted)
            assert here.keys() == right.keys()
            for name in right:
                torch.testing.assert_close(here[name], right[name])


def test_on_every_model(kind: str) -> None:
    model = two(kind, **TARGETS.get(kind, {}))
    inputs = models.batch(kind, rows=4)
    with torch.no_grad():
        torch.testing.assert_close(mixed(model, inputs), alone(model, inputs), atol=2e-6, rtol=2e-5)
    assert not torch.allclose(mixed(model, inputs), mixed(model, inputs, ["b", "a", "a", "__base__"]))


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("bert-choice", "query"),
        ("bert-tokens", "position_embeddings"),
        ("bert-qa", "token_type_embeddings"),
        ("gpt2", "wpe"),
    ],
)
def test_rows_that_are_flattened_or_spread_inside(kind: str, target: str) -> None:
    """Choices become rows of their own, and learned positions are one row for the whole batch."""
    config = LoraConfig(target_modules=[target], init_lora_weights=False)
    model = get_peft_model(models.make(kind), config, "a").eval()
    model.add_adapter("b", config)
    inputs = models.batch(kind, rows=4)
    with torch.no_grad():
        torch.testing.assert_close(mixed(model, inputs), alone(model, inputs), atol=2e-6, rtol=2e-5)


def test_a_row_that_is_spread_over_an_unknown_number() -> None:
    model = get_peft_model(models.make("bert-choice"), LoraConfig(target_modules=["position_embeddings"]), "a")
    with pytest.raises(UsageError, match=r"Embedding: its input has the shape \(1, 6\) in a batch of 2 rows"):
        mixed(model, models.batch("bert-choice"), ["a", "__base__"])


@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16, "autocast"], ids=str)
def test_coarser_dtypes_are_as_near_to_the_truth_as_each_row_alone(how: Any) -> None:
    model = two()
    inputs = models.batch("llama", rows=4)
    with torch.no_grad():
        right = alone(model, inputs)
        if how != "autocast":
            model = model.to(how)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            apart = (alone(model, inputs).float() - right).abs()
            together = (mixed(model, inputs).float() - right).abs()
    assert together.mean() < 1.25 * apart.mean()
    assert together.max() < 2 * apart.max()


def test_as_in_peft(tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on short names
        theirs = peft.PeftModel.from_pretrained(models.make("llama"), str(tmp_path / "a"), "a")
        theirs.load_adapter(str(tmp_path / "b"), "b")
    inputs = models.batch("llama", rows=4)
    with torch.no_grad():
        torch.testing.assert_close(mixed(model, inputs), mixed(theirs.eval(), inputs))


@pytest.mark.parametrize("training", [False, True])
def test_heads_that_are_trained_whole(training: bool) -> None:
    model = two("bert", task_type="SEQ_CLS", lora_dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train(training)
    model.set_requires_grad(["a", "b"])
    inputs = models.batch("bert", rows=4)
    expected = alone(model, inputs)
    expected.square().sum().backward()
    right = gradients(model)
    found = mixed(model, inputs)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    here = gradients(model)
    assert here.keys() == right.keys()
    assert any("modules_to_save.b" in name for name in right)
    for name in right:
        torch.testing.assert_close(here[name], right[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_trained_rows_of_an_embedding(kind: str) -> None:
    model = get_peft_model(models.make(kind), LoraConfig(target_modules=["q_proj"]), "a").eval()
    for name, rows in (("b", [3, 4, 5]), ("c", [5, 30])):
        model.add_adapter(name, LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "trainable_tokens" in parameter_name:
                parameter.add_(0.5)
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 30], [5, 30, 4, 3], [5, 4, 3, 30], [3, 30, 5, 4]])}
    names = ["b", "c", "a", "__base__"]
    with torch.no_grad():
        torch.testing.assert_close(mixed(model, inputs, names), alone(model, inputs, names))
        assert not torch.allclose(mixed(model, inputs, names), mixed(model, inputs, ["a"] * 4))


def test_dropout_of_each_adapter() -> None:
    """Rows of an adapter without dropout do not change when another one has it."""
    model = get_peft_model(models.make("llama"), LoraConfig(init_lora_weights=False, lora_dropout=0.5), "a").train()
    model.add_adapter("b", LoraConfig(init_lora_weights=False))
    inputs = models.batch("llama", rows=2)
    first, second = (mixed(model, inputs, ["a", "b"]) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_one_name_for_all_rows_needs_no_layout() -> None:
    model = get_peft_model(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), LoraConfig(target_modules=["linear1"]))
    x = torch.randn(5, 3, 8)
    models.randomise(model)
    torch.testing.assert_close(model(x, adapter_names=["default"] * 5), model(x))
    with pytest.raises(UsageError, match="batch_first=False"):
        model(x, adapter_names=["default", "__base__", "default", "default", "default"])


# Generating


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "beams-returned", "samples"],
)
@pytest.mark.parametrize("kind", ["llama", "t5", "whisper"])
def test_generating(kind: str, options: dict[str, Any]) -> None:
    model = two(kind)
    inputs = models.batch(kind, rows=4)
    inputs.pop("decoder_input_ids", None)
    kept = {"max_new_tokens": 5, "min_new_tokens": 5, **options}
    if "do_sample" in options:
        kept["top_k"] = 1  # so that what is drawn is known
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' remarks on tiny Whisper configs
        found = model.generate(**inputs, adapter_names=NAMES, **kept)
        each = options.get("num_return_sequences", 1)
        for number, name in enumerate(NAMES):
            with using(model, name):
                right = model.generate(**row(inputs, number), **kept)
            assert torch.equal(found[number * each : (number + 1) * each], right)
        assert len({tuple(sequence.tolist()) for sequence in found[::each]}) > 1
    assert model.base_model.router.current is None


def test_generating_without_names_is_the_models_own() -> None:
    model = two()
    inputs = models.batch("llama")["input_ids"]
    assert torch.equal(
        model.generate(inputs, max_new_tokens=3), model.get_base_model().generate(inputs, max_new_tokens=3)
    )
    assert not hasattr(get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"])), "generate")


def test_generating_refuses_what_doubles_the_batch() -> None:
    with pytest.raises(UsageError, match="guidance_scale"):
        two().generate(**models.batch("llama", rows=4), adapter_names=NAMES, guidance_scale=2.0)


# Training


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gradient_checkpointing_computes_again_with_the_same_rows(kind: str, reentrant: bool) -> None:
    """Three batches, one without names, are all forward before any goes backward."""
    model = two(kind).double()
    batches = [
        (models.batch(kind, rows=4, seed=s, dtype=torch.float64), names)
        for s, names in enumerate((NAMES, NAMES[::-1], None))
    ]

    def run() -> dict[str, Tensor]:
        total = sum(
            (mixed(model, inputs, names) if names else models.output(model, inputs)).square().sum()
            for inputs, names in batches
        )
        total.backward()
        return gradients(model)

    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for part in model.modules():
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0
    model.set_requires_grad(["a", "b"])
    right = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    own = {id(m): m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()}
    here = run()
    assert here.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(here[name], right[name])
    assert own == {id(m): m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()}


class Checkpointed(nn.Module):
    """A model that checkpoints in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def test_a_checkpointing_that_cannot_be_told_is_refused() -> None:
    model = get_peft_model(Checkpointed(), LoraConfig(target_modules=["layer"]), "a")
    x = torch.randn(2, 3, requires_grad=True)
    model(x).sum().backward()
    loss = model(x, adapter_names=["a", "__base__"]).sum()
    with pytest.raises(UsageError, match="does not say which batch"):
        loss.backward()


# Refusals


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "c", "a", "a"], "no adapter 'c'"),
        (["a", "b"], "2 names, but the batch has 4 rows"),
        (["a"] * 5, "5 names, but the batch has 4 rows"),
        ("a", "must be a list"),
        ([], "must be a list"),
        ([1, 2, 3, 4], "must be a list"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_names_that_mean_nothing(names: Any, message: str, how: str) -> None:
    model = two()
    inputs = models.batch("llama", rows=4)
    with pytest.raises(UsageError, match=message):
        (model if how == "forward" else model.generate)(**inputs, adapter_names=names)
    assert model.base_model.router.idle


def test_merged_and_disabled_adapters() -> None:
    model = two()
    inputs = models.batch("llama", rows=4)
    with model.disable_adapter(), pytest.raises(UsageError, match="disabled"):
        mixed(model, inputs)
    model.merge_adapter()
    with pytest.raises(UsageError, match="a is merged into the weights that all rows share"):
        mixed(model, inputs)


def test_biases_of_the_base_cannot_differ_between_rows() -> None:
    model = get_peft_model(models.make("opt"), LoraConfig(bias="all", init_lora_weights=False), "a").eval()
    model.add_adapter("b", LoraConfig(init_lora_weights=False))
    inputs = models.batch("opt", rows=4)
    for names in (NAMES, ["b"] * 4):
        with pytest.raises(UsageError, match="a trains the base's biases"):
            mixed(model, inputs, names)
    torch.testing.assert_close(mixed(model, inputs, ["a"] * 4), models.output(model, inputs))
    model.set_adapter("b")
    with pytest.raises(UsageError, match="a trains the base's biases"):
        mixed(model, inputs, ["a"] * 4)
    mixed(model, inputs, ["b", "__base__", "b", "b"])


class Turned(nn.Module):
    """A model that puts the sequence first; with ``reads``, one that multiplies by a weight without calling it."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.reads = nn.Linear(3, 3), nn.Linear(3, 3), reads

    def forward(self, x: Tensor) -> Tensor:
        if self.reads:
            return self.first(x) @ self.second.weight.t()
        return self.first(x.transpose(0, 1))


def test_rows_that_cannot_be_known() -> None:
    model = get_peft_model(Turned(), LoraConfig(target_modules=["first"]), "a")
    with pytest.raises(UsageError, match=r"shape \(5, 2, 3\) in a batch of 2 rows"):
        model(torch.randn(2, 5, 3), adapter_names=["a", "__base__"])


def test_a_copy_that_is_read_without_being_called() -> None:
    model = get_peft_model(Turned(reads=True), LoraConfig(target_modules=["first"], modules_to_save=["second"]), "a")
    with pytest.raises(UsageError, match="reads its weight instead of calling it"):
        model(torch.randn(2, 3), adapter_names=["a", "__base__"])


def test_experts_in_a_list() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x)

    model = get_peft_model(Mixture(), LoraConfig(target_modules=["0", "1"]), "a")
    with pytest.raises(UsageError, match=r"'experts\.\d' is an expert"):
        model(torch.randn(2, 3), adapter_names=["a", "__base__"])


def test_the_name_of_the_base_is_nobodys() -> None:
    with pytest.raises(UsageError, match="__base__"):
        get_peft_model(models.make("llama"), LoraConfig(), "__base__")


def test_two_threads_do_not_share_a_model() -> None:
    model = two()
    inputs, caught = models.batch("llama", rows=4), []

    def other() -> None:
        try:
            models.output(model, inputs)
        except UsageError as error:
            caught.append(str(error))

    with model.base_model.router.holding(routing.route(model.base_model, NAMES)):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "Another thread" in caught[0]


# Cost


def test_rows_are_grouped_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = routing.Groups.__init__
    monkeypatch.setattr(routing.Groups, "__init__", lambda self, *args: (made.append(1), original(self, *args))[1])
    model = two()
    mixed(model, models.batch("llama", rows=4))
    assert len(made) == 1


def test_factors_are_stacked_once_until_they_change() -> None:
    model = two()
    stacks, layers = model.base_model.router.stacks, len(model.base_model.layers)
    inputs = models.batch("llama", rows=4)
    names = ["b", "a", "__base__", "b"]
    with torch.no_grad():
        for _ in range(3):
            mixed(model, inputs, names)
        assert stacks.made == layers
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["a"].weight.mul_(2)
        torch.testing.assert_close(mixed(model, inputs, names), alone(model, inputs, names))
        assert stacks.made == layers + 1
        model.rename_adapter("a", "z")
        model.delete_adapter("b")
        model.add_adapter("a", LoraConfig(target_modules="all-linear", init_lora_weights=False))
        model.rename_adapter("z", "b")
        torch.testing.assert_close(mixed(model, inputs, names), alone(model, inputs, names))
    # Whatever training does to the values in ways that torch does not count.
    models.output(model, inputs)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    with torch.no_grad():
        torch.testing.assert_close(mixed(model, inputs, names), alone(model, inputs, names))


def test_copies_are_on_their_own() -> None:
    model = two()
    inputs = models.batch("llama", rows=4)
    mixed(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        router = twin.base_model.router
        assert router is not model.base_model.router
        assert all(layer.router is router for layer in twin.base_model.layers.values())
        torch.testing.assert_close(mixed(twin, inputs), mixed(model, inputs))
