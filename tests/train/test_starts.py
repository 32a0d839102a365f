"""A start that needs data gets it from the training set, without being asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import chat
from veneer.adapters.index import EVIDENCE
from veneer.adapters.model import PeftModel
from veneer.core.config import LoraConfig
from veneer.data.sources import rows_of
from veneer.tasks.causal_lm import Task
from veneer.train import starts
from veneer.train.config import RunConfig
from veneer.train.loop import RunResult, train

TARGETS = ["q_proj", "v_proj", "down_proj"]


def run(folder: Path, **settings: Any) -> RunResult:
    values = {"batch_size": 4, "learning_rate": 5e-3, "schedule": "constant", "warmup": 0, "target_modules": TARGETS}
    return train(
        RunConfig(output=str(folder), r=4, **{**values, **settings}),
        model=chat.model(),
        tokenizer=chat.tokenizer(),
        train_rows=chat.pairs(12),
    )


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_a_run_starts_from_its_data_at_the_bases_loss_and_learns(init: str, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", max_steps=1).record
    result = run(tmp_path / "run", epochs=4, init_lora_weights=init)
    record = result.record
    assert record.held_out_before["loss"] == pytest.approx(plain.held_out_before["loss"], rel=1e-5)
    assert record.held_out_after["loss"] < record.held_out_before["loss"]
    assert not any(EVIDENCE in module.__dict__ for module in result.model.modules())
    again = PeftModel.from_pretrained(chat.model(), tmp_path / "run" / "last")
    ids = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, result.model(input_ids=ids).logits)


def test_the_log_says_what_was_read(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1, init_lora_weights="eva", eva_config={"rho": 1.5})
    assert "init_lora_weights='eva' read the first 11 training examples; ranks go from " in (
        tmp_path / "log.jsonl"
    ).read_text().replace("\\u0027", "'")
    assert RunConfig.read(tmp_path / "run.yaml").eva_config == {"rho": 1.5}


def encoded() -> tuple[Any, Any, Any]:
    task, rows = Task(), rows_of(chat.pairs(12))
    tokenizer, _ = task.prepare(rows, chat.tokenizer())
    return task, tokenizer, task.encode(rows, tokenizer, max_length=64, train_on="completion").examples


def gather(config: LoraConfig) -> Any:
    task, tokenizer, examples = encoded()
    model = chat.model()
    return model, starts.gathering(task, examples, tokenizer, 4)(model, config)


def test_only_the_first_examples_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "MOST", 3)
    _, (_, notes) = gather(LoraConfig(init_lora_weights="corda", target_modules=TARGETS, r=4))
    assert notes == ("init_lora_weights='corda' read the first 3 training examples.",)


def test_a_start_without_data_reads_none() -> None:
    config = LoraConfig(init_lora_weights="pissa", target_modules=TARGETS, r=4)
    model, (same, notes) = gather(config)
    assert same is config
    assert notes == ()
    assert not any(EVIDENCE in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("masked", [True, False])
def test_eva_looks_at_trained_tokens_unless_told_otherwise(masked: bool) -> None:
    config = LoraConfig(
        init_lora_weights="eva", target_modules=TARGETS, r=4, eva_config={"use_label_mask": masked, "rho": 1.0}
    )
    model, (config, _) = gather(config)
    assert config.rank_pattern == {}
    task, tokenizer, examples = encoded()
    plain, rows = chat.model(), []
    target = plain.model.layers[1].self_attn.q_proj
    hook = target.register_forward_pre_hook(lambda module, args: rows.append(args[0][0]))
    with torch.no_grad():
        for example in examples:
            batch = task.collate([example], tokenizer)
            plain(batch["input_ids"])
            rows[-1] = rows[-1][batch["labels"][0] != -100] if masked else rows[-1]
    hook.remove()
    every = torch.cat(rows).double()
    first = torch.linalg.svd(every - every.mean(0), full_matrices=False)[2][0]
    found = model.model.layers[1].self_attn.q_proj.__dict__[EVIDENCE]["directions"]
    assert found.shape == (4, every.shape[1])
    assert abs(float(found[0].double() @ first)) > 0.999
