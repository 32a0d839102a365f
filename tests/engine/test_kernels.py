from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from tests import models
from tests.engine.decoders import FAMILIES, make
from veneer.adapters.model import get_peft_model
from veneer.core.config import LoraConfig
from veneer.engine import groups, mlps
from veneer.engine.checkpointing import checkpoint_layers
from veneer.engine.kernels import Kernels, use_kernels

FOUND = {
    # norms, blocks, groups, rotations
    "Llama": (7, 3, 3, 3),
    "Mistral": (7, 3, 3, 3),
    "Qwen2": (7, 3, 3, 3),
    "Qwen3": (13, 3, 3, 3),
    "Gemma": (7, 3, 3, 3),
    "Gemma2": (13, 3, 3, 3),
    "Gemma3": (19, 3, 3, 3),
    "Granite": (7, 3, 3, 3),
    "SmolLM3": (7, 3, 3, 3),
    "Olmo2": (13, 3, 3, 3),
    "GPT2": (0, 0, 0, 0),
    "OPT": (0, 0, 3, 0),
    "Phi3": (7, 0, 0, 3),
}


def adapted(family: str, **settings: Any) -> Any:
    config = LoraConfig(**{"target_modules": "all-linear", "init_lora_weights": False, **settings})
    return get_peft_model(make(family), config)


def output_and_gradients(model: Any, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    ids = torch.randint(3, 97, (2, 7))
    logits = model(input_ids=ids, use_cache=False).logits
    (logits * torch.randn_like(logits)).sum().backward()
    found = [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def same(model: Any, kernels: Kernels) -> None:
    """Outputs and gradients with the kernels, and after they were taken away."""
    fused = output_and_gradients(model)
    kernels.undo()
    for ours, own in zip(fused, output_and_gradients(model), strict=True):
        # Sums in another order: the error follows the largest terms, not each result.
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5 * max(1.0, float(own.abs().max())))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_kernels_change_nothing_but_what_is_kept(family: str, targets: str) -> None:
    if targets == "some":
        linears = {n.rpartition(".")[2] for n, m in make(family).named_modules() if isinstance(m, torch.nn.Linear)}
        targets = sorted(linears - {"lm_head"})[-1:] or "all-linear"
    model = adapted(family, target_modules=targets)
    kernels = use_kernels(model)
    found = (kernels.norms, kernels.mlps, kernels.groups, kernels.rotations)
    assert found == FOUND.get(family, found)
    same(model, kernels)
    assert not any("forward" in module.__dict__ for module in model.get_base_model().modules())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_less_is_kept(dropout: float) -> None:
    def kept(model: Any) -> int:
        seen: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(input_ids=torch.randint(3, 97, (4, 32)), use_cache=False)
        return sum(seen.values())

    model = adapted("Llama", target_modules=["q_proj", "v_proj"], lora_dropout=dropout).train()
    before = kept(model)
    use_kernels(model)
    assert kept(model) < 0.9 * before


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"lora_dropout": 0.5},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["up_proj", "k_proj"]},
        {"modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_every_adapter_keeps_its_meaning(settings: dict[str, Any]) -> None:
    model = adapted("Llama", **settings)
    kernels = use_kernels(model)
    if settings.get("lora_dropout"):
        model.train()
    same(model, kernels)


def test_several_adapters_merged_disabled_and_routed() -> None:
    model = adapted("Llama")
    model.add_adapter("other", LoraConfig(target_modules="all-linear", init_lora_weights=False))
    kernels = use_kernels(model)
    ids = torch.randint(3, 97, (2, 7))
    ways: dict[str, Any] = {
        "one": lambda: model.set_adapter("other"),
        "both": lambda: model.set_adapter(["default", "other"]),
        "merged": lambda: (model.set_adapter("default"), model.merge_adapter()),
        "unmerged": model.unmerge_adapter,
    }
    with torch.no_grad():
        for name, change in ways.items():
            change()
            fused = model(input_ids=ids).logits
            forwards = {module: module.__dict__.pop("forward") for module in kernels.modules}
            own = model(input_ids=ids).logits
            for module, forward in forwards.items():
                module.__dict__["forward"] = forward
            torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5, msg=name)
        with model.disable_adapter():
            base = make("Llama")(input_ids=ids).logits
            torch.testing.assert_close(model(input_ids=ids).logits, base, rtol=1e-5, atol=1e-5)
        rows = model(input_ids=ids, adapter_names=["other", "__base__"]).logits
        torch.testing.assert_close(rows[1], base[1], rtol=1e-5, atol=1e-5)


def test_full_fine_tuning_keeps_its_gradients() -> None:
    model = make("Llama")
    same(model, use_kernels(model))


def test_under_autocast_and_in_bfloat16() -> None:
    model = adapted("Llama")
    use_kernels(model)
    with torch.autocast("cpu", torch.bfloat16):
        output_and_gradients(model)
    whole = adapted("Llama").to(torch.bfloat16)
    reference = copy.deepcopy(whole)
    kernels = use_kernels(whole)
    assert (kernels.norms, kernels.mlps) == (7, 3)
    ids = torch.randint(3, 97, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, reference(ids).logits, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_bfloat16_base_under_its_own_autocast_keeps_the_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(family).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    run = []
    for module in (mlps, groups):
        name = "gated_mlp" if module is mlps else "lora_group"
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=own, name=name: (run.append(name), own(*args))[1])
    kernels = use_kernels(model)
    run.clear()
    with torch.autocast("cpu", torch.bfloat16):
        fused = output_and_gradients(model)
        assert run.count("gated_mlp") == run.count("lora_group") == 3
        kernels.undo()
        plain = output_and_gradients(model)
    for ours, own in zip(fused, plain, strict=True):
        assert ours.dtype == own.dtype
        torch.testing.assert_close(ours, own, rtol=5e-2, atol=5e-2 * max(1.0, float(own.abs().max())))


def test_gradient_checkpointing_computes_the_same_again() -> None:
    model = adapted("Llama").train()
    use_kernels(model)
    plain = output_and_gradients(model)
    checkpoint_layers(model)
    again = output_and_gradients(model)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_a_copy_has_kernels_of_its_own() -> None:
    model = adapted("Llama")
    use_kernels(model)
    twin = copy.deepcopy(model)
    before = output_and_gradients(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for one, other in zip(before, output_and_gradients(twin), strict=True):
        torch.testing.assert_close(one, other)


def test_generation_is_as_before() -> None:
    model = adapted("Llama")
    prompt = torch.randint(3, 97, (1, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    before = model.generate(input_ids=prompt, **settings)
    use_kernels(model)
    assert torch.equal(model.generate(input_ids=prompt, **settings), before)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "t5", "whisper", "vit"])
def test_other_models_than_decoders(kind: str) -> None:
    model = get_peft_model(models.make(kind), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    inputs = models.batch(kind)
    with torch.no_grad():
        before = model(**inputs)[0]
        kernels = use_kernels(model)
        torch.testing.assert_close(model(**inputs)[0], before, rtol=1e-5, atol=1e-5)
    assert kernels.groups == {"bert": 2, "distilbert": 2, "t5": 6}.get(kind, 0)


def test_what_was_found_reads_well() -> None:
    assert str(use_kernels(adapted("Llama"))) == (
        "7 norms, 3 feed-forward blocks, 3 groups of layers, 3 rotary attentions"
    )
    assert str(use_kernels(transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=1)))) == (
        "nothing"
    )


def encoder(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "num_labels": 2, "pad_token_id": 0, **settings}
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "DistilBert":
        small = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "dropout": 0.0, "seq_classif_dropout": 0.0}
    if kind == "GPT2":
        small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    if kind in ("Bert", "Roberta", "Electra"):
        small["hidden_dropout_prob"] = 0.0
    config = getattr(transformers, f"{kind}Config")(**sizes, **small)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


PADDED = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [3, 4, 5, 0, 0], [8, 7, 6, 5, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
    "labels": torch.tensor([0, 1, 1]),
}
DROPPED = {"DistilBert": "attention_dropout", "GPT2": "attn_pdrop"}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "DistilBert", "GPT2"])
def test_attention_with_dropout_keeps_no_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    share = DROPPED.get(kind, "attention_probs_dropout_prob")
    plain, fast = encoder(kind, **{share: 0.0}), encoder(kind, **{share: 0.3})

    def weights_kept() -> int:
        """How many tensors of scores, tokens by tokens, a training pass keeps for backward."""
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            fast.train()(**PADDED)
        return sum(t.is_floating_point() and t.shape[-2:] == (5, 5) for t in kept)

    assert weights_kept() > 0, "torch's own keeps them"
    put = use_kernels(fast)
    assert weights_kept() == 0
    assert "attention with dropout" in str(put)
    fast.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(fast(**PADDED).logits, plain(**PADDED).logits)

    def passed(model: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model.train()(**PADDED).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    drawn = [float(passed(fast)[0]) for _ in range(3)]
    assert len(set(drawn)) == 3, "weights are dropped while training"
    seeds = []
    for _ in range(2):
        torch.manual_seed(4)
        seeds.append(passed(fast))
    assert all(torch.equal(a, b) for a, b in zip(*seeds, strict=True))
    # With masks that keep all it has to be the model without dropout.
    monkeypatch.setattr(
        "veneer.kernels.dropout.mask", lambda shape, p, **kwargs: torch.ones(shape, dtype=kwargs["dtype"])
    )
    monkeypatch.setattr("veneer.kernels.dropout.weight", lambda p: 1.0)
    for got, wanted in zip(passed(fast), passed(plain), strict=True):
        torch.testing.assert_close(got, wanted)
    put.undo()
    assert fast.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("Bert", {"attention_probs_dropout_prob": 0.0}), ("Bert", {"attn_implementation": "eager"}), ("ModernBert", {})],
    ids=str,
)
def test_attention_is_left_alone_where_nothing_is_gained(kind: str, settings: dict[str, Any]) -> None:
    model = encoder(kind, **settings)
    before = model.config._attn_implementation
    assert use_kernels(model).own_attention is None
    assert model.config._attn_implementation == before
