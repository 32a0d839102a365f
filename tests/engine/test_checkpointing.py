"""Layers that compute twice: the same bits, less kept, and what a measuring pass says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset

from tests import chat
from veneer.adapters.model import get_peft_model
from veneer.core.config import LoraConfig
from veneer.core.errors import ConfigError
from veneer.engine.checkpointing import Kept, blocks, checkpoint_layers, measure

LAYERS = 4


def adapted(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(chat.model(num_hidden_layers=LAYERS), config).train()


def packed() -> dict[str, Tensor]:
    """Two examples end to end, as DataCollatorWithFlattening lays them."""
    ids = torch.arange(3, 23)[None]
    borders = torch.tensor([0, 8, 20], dtype=torch.int32)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    return {
        "input_ids": ids, "labels": ids, "position_ids": positions, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders,
        "max_length_q": 12, "max_length_k": 12,
    }  # fmt: skip


def step(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 3, LAYERS, None])
def test_losses_and_gradients_are_the_same_bits(count: int | None, dropout: float) -> None:
    model = adapted(dropout)
    plain = step(model, packed())
    checkpoint_layers(model, count)
    assert sum(block.gradient_checkpointing for block in blocks(model)) == (LAYERS if count is None else count)
    again = step(model, packed())
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    checkpoint_layers(model, 0)
    assert not any(block.gradient_checkpointing for block in blocks(model))


def seen_lengths(model: Any, count: int) -> list[Any]:
    """What the attention layers are told of the examples' borders, in every call."""
    seen: list[Any] = []
    for module in model.modules():
        if type(module).__name__ == "LlamaAttention":
            module.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs.get("cu_seq_lens_q")), with_kwargs=True
            )
    checkpoint_layers(model, count)
    step(model, packed())
    return seen


def test_borders_of_packed_examples_reach_the_recomputation() -> None:
    seen = seen_lengths(adapted(), 3)
    assert len(seen) == LAYERS + 3
    assert all(torch.equal(borders, packed()["cu_seq_lens_q"]) for borders in seen)


def kept_bytes(model: Any, batch: dict[str, Any]) -> int:
    """What autograd holds at the end of a forward pass that keeps everything; parameters left out."""
    static = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in static:
            alive[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, use_cache=False).loss
    size = sum(tensor.untyped_storage().nbytes() for tensor in alive.values())
    del loss
    return size


def test_what_is_measured_is_what_is_kept() -> None:
    model, batch = adapted(0.3), packed()
    before = torch.get_rng_state()
    kept = measure(model, lambda: model(**batch, use_cache=False))
    assert torch.equal(before, torch.get_rng_state())
    assert len(kept.layers) == len(kept.inputs) == LAYERS
    whole = kept_bytes(model, batch)
    # Only the rotary embedding and the borders between layers are counted more than once, or not at all.
    assert kept.rest + sum(kept.layers) == pytest.approx(whole, rel=0.1)
    # The first input comes from frozen embeddings: it is kept for A alone.
    assert kept.inputs == (0, *[20 * 32 * 4] * (LAYERS - 1))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks(model))


def test_a_measuring_pass_keeps_nothing() -> None:
    model, batch = adapted(), packed()
    output = {}
    measure(model, lambda: output.update(model(**batch, use_cache=False)))
    with pytest.raises(AssertionError, match="no backward"):
        output["loss"].backward()


KEPT = Kept(layers=(100, 100, 100), inputs=(10, 10, 10), rest=50)


@pytest.mark.parametrize(("room", "count"), [(450, 0), (449, 1), (360, 1), (359, 2), (270, 2), (269, 3), (10, 3)])
def test_as_few_layers_as_fit(room: int, count: int) -> None:
    assert KEPT.needed(room) == count
    assert [KEPT.peak(n) for n in range(4)] == [450, 360, 270, 180]


def test_too_many_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="checkpoint is 9, but LlamaForCausalLM has 4 layers"):
        checkpoint_layers(adapted(), 9)


def test_a_model_without_checkpointing_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear does not support gradient checkpointing"):
        checkpoint_layers(torch.nn.Linear(2, 2))


class Examples(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = [3 + (index * 7 + place) % 90 for place in range(12)]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("count", [2, None])
def test_in_transformers_own_trainer(count: int | None, tmp_path: Path) -> None:
    def losses(checkpointed: int | None) -> list[float]:
        model = adapted(0.2)
        checkpoint_layers(model, checkpointed)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Examples(), data_collator=transformers.default_data_collator
        )
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    assert losses(count) == losses(0)
