"""Runs of the other families of adapters, against the same training in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed

from tests import chat
from veneer import AdaLoraConfig, ConfigError, PeftModel, VeraConfig, get_peft_model
from veneer.core.config import TunerConfig
from veneer.data.collate import collate
from veneer.data.sources import rows_of
from veneer.optimizers import create_loraplus_optimizer
from veneer.tasks import task as tasks
from veneer.train.config import RunConfig
from veneer.train.loop import RunResult, train

TARGETS = ["q_proj", "down_proj"]
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "target_modules": TARGETS}
VERA = {"r": 16, "target_modules": TARGETS, "d_initial": 0.5}


def run(folder: Path, **settings: Any) -> RunResult:
    values = {"batch_size": 4, "accumulation": 2, "learning_rate": 5e-2, "schedule": "constant", "warmup": 0}
    return train(
        RunConfig(output=str(folder), clip=None, epochs=6, eval_fraction=0, **values, **settings),
        model=chat.model(),
        tokenizer=chat.tokenizer(),
        train_rows=chat.pairs(8),
    )


def plain(config: TunerConfig, optimiser: Any = None) -> torch.nn.Module:
    """All rows in one batch, transformers' own loss, six steps."""
    tokenizer, base = chat.tokenizer(), chat.model()
    set_seed(0)
    model = get_peft_model(base, config).train()
    encoded = tasks.get("causal_lm").encode(rows_of(chat.pairs(8)), tokenizer, max_length=128, train_on="completion")
    batch = collate(encoded.examples, pad_id=0)
    learning = [p for p in model.parameters() if p.requires_grad]
    own = optimiser(model) if optimiser else torch.optim.AdamW(learning, lr=5e-2, weight_decay=0.0)
    for step in range(1, 7):
        model(**batch).loss.backward()
        own.step()
        if isinstance(config, AdaLoraConfig):
            model.base_model.update_and_allocate(step)
        own.zero_grad()
    return model


def same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    theirs = {name: p for name, p in expected.named_parameters() if p.requires_grad}
    ours = {name: p for name, p in found.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: name + text)


def test_adalora_ends_at_its_budget_and_its_file_has_the_ranks_that_stayed(tmp_path: Path) -> None:
    result = run(tmp_path / "run", family="adalora", **ADALORA)
    config = result.model.peft_config["default"]
    assert config.total_step == result.record.steps == 6
    assert sum(sum(kept) for kept in config.rank_pattern.values()) == 2 * len(config.rank_pattern)
    expected = plain(AdaLoraConfig(**ADALORA, total_step=6))
    assert config.rank_pattern == expected.peft_config["default"].rank_pattern
    same(result.model, expected)
    loaded = PeftModel.from_pretrained(chat.model(), tmp_path / "run" / "last")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits, rtol=1e-5, atol=1e-5)
    assert sum(layer.r["default"] for layer in loaded.base_model.layers.values()) == 2 * len(config.rank_pattern)


def test_vera(tmp_path: Path) -> None:
    same(run(tmp_path / "run", family="vera", **VERA).model, plain(VeraConfig(**VERA)))


def test_loraplus(tmp_path: Path) -> None:
    from veneer import LoraConfig

    def optimiser(model: PeftModel) -> torch.optim.Optimizer:
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-2, loraplus_lr_ratio=4, weight_decay=0.0)

    found = run(tmp_path / "run", target_modules=TARGETS, loraplus_lr_ratio=4).model
    same(found, plain(LoraConfig(target_modules=TARGETS), optimiser))


def test_loraplus_without_a_B_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loraplus_lr_ratio has no meaning with family=vera"):
        run(tmp_path / "run", family="vera", **VERA, loraplus_lr_ratio=4)
    assert not (tmp_path / "run").exists()


def test_a_schedule_that_does_not_fit_the_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tinit=5 and tfinal=2 leave none of the total_step=6 steps"):
        run(tmp_path / "run", family="adalora", **{**ADALORA, "tinit": 5})
    assert not (tmp_path / "run").exists()
