"""PeftModel from outside: PEFT's names, the wrapped model's attributes, training, checkpointing."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from tests import models
from veneer import LoraConfig, PeftConfig, PeftModel, UsageError, get_peft_model

CONFIG = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)

NAMES = [
    "from_pretrained",
    "save_pretrained",
    "add_adapter",
    "load_adapter",
    "set_adapter",
    "delete_adapter",
    "disable_adapter",
    "print_trainable_parameters",
    "get_nb_trainable_parameters",
    "active_adapters",
    "get_base_model",
]


@pytest.mark.parametrize("name", NAMES)
def test_pefts_names_take_pefts_arguments(name: str) -> None:
    """Every argument of PEFT's public methods that has a meaning here, in PEFT's order."""
    ours, theirs = getattr(PeftModel, name), getattr(peft.PeftModel, name)
    if isinstance(theirs, property):
        assert isinstance(ours, property)
        return
    # Only for features that are not built: other processes' devices, offloading.
    not_here = {
        *("ephemeral_gpu_offload", "ignore_mismatched_sizes", "key_mapping", "kwargs"),
        *("torch_device", "args"),
    }
    wanted = [p for p in inspect.signature(theirs).parameters if p not in not_here]
    mine = inspect.signature(ours).parameters
    assert set(wanted) <= set(mine)
    by_position = [name for name, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == [name for name in wanted if name in by_position]


def test_get_peft_model_takes_pefts_arguments() -> None:
    mine = list(inspect.signature(get_peft_model).parameters)
    theirs = list(inspect.signature(peft.get_peft_model).parameters)
    assert [p for p in theirs if p in mine] == mine
    assert set(theirs) - set(mine) <= {"mixed"}


def test_parameter_names_are_pefts(kind: str) -> None:
    fields = {"target_modules": "all-linear", "r": 2}
    ours = get_peft_model(models.make(kind), LoraConfig(**fields), "some")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks
        theirs = peft.get_peft_model(models.make(kind), peft.LoraConfig(**fields), "some")
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_layers_read_as_in_peft(llama: nn.Module) -> None:
    adapted = get_peft_model(llama, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, nn.Linear)
    assert layer.lora_A["default"].weight.shape == (4, models.D)
    assert (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) == (4, 6, 1.5)
    assert (layer.active_adapters, layer.merged_adapters, layer.merged) == (["default"], [], False)
    assert layer.in_features == models.D
    assert layer.weight is layer.base_layer.weight
    assert layer.get_base_layer() is layer.base_layer
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
    assert "default: r=4 alpha=6" in repr(layer)


def test_the_wrapped_models_attributes_are_reachable(llama: nn.Module) -> None:
    adapted = get_peft_model(llama, CONFIG)
    assert adapted.config is llama.config
    assert adapted.device == torch.device("cpu")
    assert adapted.dtype == torch.float32
    assert adapted.get_base_model() is llama
    assert adapted.base_model.model is llama
    assert adapted.lm_head is llama.lm_head
    with pytest.raises(AttributeError, match="nothing"):
        _ = adapted.nothing
    assert next(iter(inspect.signature(adapted.forward).parameters)) == "input_ids"
    assert type(adapted) is PeftModel
    assert repr(adapted).startswith("PeftModel(")


def test_it_passes_for_pefts_class(llama: nn.Module) -> None:
    adapted = get_peft_model(llama, CONFIG)
    assert isinstance(adapted, PeftModel)
    assert isinstance(adapted, peft.PeftModel)
    assert isinstance(adapted, nn.Module)


def test_generating_runs_the_adapter(llama: nn.Module) -> None:
    inputs = models.batch("llama")["input_ids"]
    kept = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = llama.generate(inputs, **kept)
    adapted = get_peft_model(llama, CONFIG).eval()
    models.randomise(adapted)
    after = adapted.generate(inputs, **kept)
    assert after.shape == before.shape == (2, 10)
    assert not torch.equal(after, before)
    with adapted.disable_adapter():
        assert torch.equal(adapted.generate(input_ids=inputs, **kept), before)


def train(model: Any, steps: int = 8) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    inputs, losses = models.batch("llama"), []
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def test_it_learns_and_the_base_does_not_move(llama: nn.Module) -> None:
    adapted = get_peft_model(llama, LoraConfig(target_modules="all-linear")).train()
    losses = train(adapted)
    assert losses[-1] < losses[0] - 0.1
    right = models.make("llama").state_dict()
    assert all(torch.equal(tensor, right[name]) for name, tensor in adapted.unload().state_dict().items())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_with_frozen_embeddings(when: str, reentrant: bool) -> None:
    plain = get_peft_model(models.make("llama"), CONFIG).train()
    torch.manual_seed(0)
    model = models.make("llama")
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if when == "before":
        model.gradient_checkpointing_enable(**options)
    adapted = get_peft_model(model, CONFIG).train()
    if when == "after":
        adapted.gradient_checkpointing_enable(**options)
        adapted.enable_input_require_grads()
    adapted.load_state_dict(plain.state_dict())
    inputs = models.batch("llama")
    for each in (plain, adapted):
        models.output(each, inputs).square().sum().backward()
    right = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, right[name])


def test_counting(llama: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    base = sum(p.numel() for p in llama.parameters())
    adapted = get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj"]))
    trained = models.LAYERS * 2 * 4 * models.D
    assert adapted.get_nb_trainable_parameters() == (trained, base + trained)
    adapted.print_trainable_parameters()
    share = 100 * trained / (base + trained)
    line = f"trainable params: {trained:,} || all params: {base + trained:,} || trainable%: {share:.4f}\n"
    assert capsys.readouterr().out == line


def test_counting_a_head_whose_original_is_the_embedding_still_in_use() -> None:
    adapted = get_peft_model(
        models.make("llama-tied"), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    table = models.V * models.D
    base = sum(p.numel() for p in models.make("llama-tied").parameters())
    factors = models.LAYERS * 2 * 4 * models.D
    assert adapted.get_nb_trainable_parameters() == (factors + table, base + factors + table)


def test_loaded_for_use_or_for_training(tmp_path: Path, llama: nn.Module) -> None:
    get_peft_model(llama, CONFIG).save_pretrained(tmp_path)
    model = models.make("llama").train()
    used = PeftModel.from_pretrained(model, tmp_path)
    assert not used.training
    assert not any(p.requires_grad for p in used.parameters())
    assert used.peft_config["default"].inference_mode
    trained = PeftModel.from_pretrained(models.make("llama").train(), tmp_path, is_trainable=True)
    assert trained.training
    assert all(p.requires_grad == (".lora_" in name) for name, p in trained.named_parameters())
    assert not trained.peft_config["default"].inference_mode
    frozen = get_peft_model(models.make("llama"), LoraConfig(inference_mode=True))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_loading_one_more(tmp_path: Path, llama: nn.Module) -> None:
    adapted = get_peft_model(llama, CONFIG).eval()
    adapted.save_pretrained(tmp_path)
    report = adapted.load_adapter(tmp_path, "more")
    assert len(report.targets) == 4
    assert adapted.active_adapters == ["default"]
    inputs = models.batch("llama")
    before = models.output(adapted, inputs)
    adapted.set_adapter("more")
    assert torch.equal(models.output(adapted, inputs), before)


def test_what_describes_it(llama: nn.Module) -> None:
    adapted = get_peft_model(llama, CONFIG)
    assert isinstance(adapted.active_peft_config, PeftConfig)
    assert adapted.peft_type == "LORA"
    assert [pattern.pattern for pattern in adapted.match_report.patterns] == ["q_proj", "v_proj"]
    adapted.add_adapter("b", CONFIG)
    adapted.set_adapter(["default", "b"])
    assert adapted.active_adapter == ["default", "b"]


def test_state_dicts(llama: nn.Module) -> None:
    adapted = get_peft_model(llama, CONFIG)
    other = get_peft_model(models.make("llama"), CONFIG)
    inputs = models.batch("llama")
    assert not torch.equal(models.output(adapted, inputs), models.output(other, inputs))
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(models.output(adapted, inputs), models.output(other, inputs))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_state_dict_of_one_adapter_goes_into_the_active_one(tmp_path: Path, llama: nn.Module) -> None:
    from safetensors.torch import load_file

    adapted = get_peft_model(llama, CONFIG)
    adapted.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    other = get_peft_model(models.make("llama"), CONFIG)
    other.load_state_dict(state)
    inputs = models.batch("llama")
    assert torch.equal(models.output(adapted, inputs), models.output(other, inputs))
    # A single number would be spread over a whole factor by a plain copy.
    with pytest.raises(RuntimeError):
        other.load_state_dict({key: tensor[:1, :1] for key, tensor in state.items()})
    assert torch.equal(models.output(adapted, inputs), models.output(other, inputs))


def test_tokenizer_is_saved_beside(tmp_path: Path, llama: nn.Module) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    get_peft_model(llama, CONFIG).save_pretrained(tmp_path, tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").is_file()


def test_plain_torch_modules() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = model(x)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
    assert torch.equal(adapted(x), expected)
    assert adapted.merge_and_unload() is model


def test_unknown_adapter_to_save(tmp_path: Path, llama: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"no adapter 'defualt'.*'default'"):
        get_peft_model(llama, CONFIG).save_pretrained(tmp_path / "x", selected_adapters=["defualt"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("option", [{"device_map": "auto"}, {"torch_dtype": torch.float16}, {"dtype": torch.float16}])
def test_options_that_do_nothing_in_peft_either_are_said_to(option, tmp_path):
    model = get_peft_model(models.make("llama"), LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no effect on loading an adapter"):
        loaded = PeftModel.from_pretrained(models.make("llama"), tmp_path, **option)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_an_unknown_option_of_loading_is_named(tmp_path):
    model = get_peft_model(models.make("llama"), LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"no option 'revison'\. Did you mean 'revision'"):
        PeftModel.from_pretrained(models.make("llama"), tmp_path, revison="main")


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], None])
def test_the_report_counts_what_the_adapted_model_uses(saved):
    """A tied table behind a trained copy is still in use by the module that shares it."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=saved)
    model = get_peft_model(models.make("llama-tied"), config)
    assert (model.match_report.trainable, model.match_report.total) == model.get_nb_trainable_parameters()
