from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import set_seed

from tests import chat
from veneer.adapters.model import PeftModel, get_peft_model
from veneer.core.errors import ConfigError, DataError, DiskError, TargetError, TrainingError, UsageError
from veneer.data.collate import collate
from veneer.data.sources import rows_of
from veneer.tasks import task as tasks
from veneer.tasks.causal_lm import Task
from veneer.train.config import RunConfig
from veneer.train.loop import RunResult, train

FAST = {"batch_size": 4, "learning_rate": 5e-3, "target_modules": "all-linear", "schedule": "constant", "warmup": 0}


def run(folder: Path, *, rows: list[dict] | None = None, model: Any = None, **settings: Any) -> RunResult:
    values = {"output": str(folder), **FAST, **settings}
    if values.get("method", "lora") != "lora":
        del values["target_modules"]
    return train(
        RunConfig(**values),
        model=chat.model() if model is None else model,
        tokenizer=chat.tokenizer(),
        train_rows=chat.pairs(12) if rows is None else rows,
    )


def events(folder: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_run_leaves_all_that_it_promises(tmp_path: Path) -> None:
    result = run(tmp_path / "run", epochs=8)
    record = result.record
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "run.yaml", "log.jsonl", "result.json", "best", "last", "checkpoints"
    }  # fmt: skip
    assert record.held_out_after["loss"] < record.held_out_before["loss"]
    assert record.steps == record.planned_steps == len(events(tmp_path / "run", "step")) == 24
    assert [event["step"] for event in events(tmp_path / "run", "eval")] == [0, *range(3, 25, 3)]
    assert record.best_loss == min(event["loss"] for event in events(tmp_path / "run", "eval")[1:])
    assert json.loads((tmp_path / "run/result.json").read_text())["best_step"] == record.best_step
    # What multiplies is settled by then: torch, for a model as narrow as this.
    asked = RunConfig(output=str(tmp_path / "run"), epochs=8, **FAST)
    assert RunConfig.read(tmp_path / "run/run.yaml") == asked.model_copy(update={"matmul": "torch"})
    assert not result.model.training
    card = (tmp_path / "run/best/README.md").read_text()
    assert "| trained with | adamw, learning rate 0.005 (constant), 4 examples a step, fp32, seed 0 |" in card


@pytest.mark.parametrize("name", ["best", "last"])
def test_saved_adapters_load_with_their_tokenizer(tmp_path: Path, name: str) -> None:
    result = run(tmp_path / "run", epochs=4)
    loaded = PeftModel.from_pretrained(chat.model(), tmp_path / "run" / name)
    ids = torch.arange(20)[None]
    if name == "last":
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / name)
    assert tokenizer.chat_template == chat.CHAT_TEMPLATE
    card = (tmp_path / "run" / name / "README.md").read_text()
    assert "held-out loss" in card


def reference_run(rows: list[dict], *, steps: int, clip: float, rate: float) -> dict[str, torch.Tensor]:
    """The same training in plain torch: all rows in one batch, transformers' own loss."""
    tokenizer = chat.tokenizer()
    base = chat.model()
    set_seed(0)
    model = get_peft_model(base, RunConfig(output="x", **FAST).adapter())
    encoded = tasks.get("causal_lm").encode(rows_of(rows), tokenizer, max_length=128, train_on="completion")
    batch = collate(encoded.examples, pad_id=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        optimiser.zero_grad()
    return trained_tensors(model)


@pytest.mark.parametrize("packing", [{"packing": "off"}, {"packing": "on"}, {"max_tokens": 40}, {"max_tokens": 1}])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (3, 3), (1, 8)])
def test_accumulated_batches_train_as_one_big_batch(
    tmp_path: Path, batch_size: int, accumulation: int, packing: dict[str, Any]
) -> None:
    rows = chat.pairs(8)
    result = run(
        tmp_path / "run",
        rows=rows,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=3,
        eval_fraction=0,
        clip=0.05,
        **packing,
    )
    assert result.record.steps == 3
    expected = reference_run(rows, steps=3, clip=0.05, rate=5e-3)
    found = trained_tensors(result.model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("packing", ["auto", "on", "off"])
def test_a_run_says_how_examples_lie(tmp_path: Path, packing: str) -> None:
    notes = " ".join(run(tmp_path / "run", epochs=1, packing=packing, max_tokens=64).record.notes)
    assert ("Examples are packed, at most 64 tokens at once" in notes) == (packing != "off")


def test_a_model_that_cannot_pack_is_padded_or_refused(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=400, hidden_size=16, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config)
    with pytest.raises(ConfigError, match="packing=on is not possible: BloomForCausalLM"):
        run(tmp_path / "on", model=model, packing="on")
    assert not (tmp_path / "on").exists()
    result = run(tmp_path / "auto", model=transformers.BloomForCausalLM(config), epochs=1)
    assert "Batches are padded, because BloomForCausalLM" in " ".join(result.record.notes)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    plain = run(tmp_path / "a", epochs=1)
    checkpointed = run(tmp_path / "b", epochs=1, checkpoint="on")
    assert not checkpointed.model.is_gradient_checkpointing
    for name, tensor in trained_tensors(plain.model).items():
        torch.testing.assert_close(dict(checkpointed.model.named_parameters())[name], tensor)


def test_the_seed_decides(tmp_path: Path) -> None:
    one, same, other = (
        run(tmp_path / name, epochs=1, seed=seed, lora_dropout=0.2) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    losses = [[event["loss"] for event in events(result.folder, "step")] for result in (one, same, other)]
    assert losses[0] == losses[1] != losses[2]


def test_bf16_trains_fp32_parameters_and_may_follow_an_fp32_run(tmp_path: Path) -> None:
    run(tmp_path / "a", max_steps=1)
    result = run(tmp_path / "b", epochs=4, precision="bf16")
    assert {p.dtype for p in trained_tensors(result.model).values()} == {torch.float32}
    assert result.record.held_out_after["loss"] < result.record.held_out_before["loss"]
    run(tmp_path / "c", max_steps=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["full", "head"])
def test_whole_models_load_in_plain_transformers(tmp_path: Path, method: str, tied: bool) -> None:
    before = chat.model(tied=tied)
    result = run(tmp_path / "run", model=chat.model(tied=tied), method=method, epochs=2)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/last")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    head_changed = not torch.equal(loaded.lm_head.weight, before.lm_head.weight)
    body_changed = not torch.equal(loaded.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert head_changed
    assert body_changed == (method == "full")
    still_tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert still_tied == (tied and method == "full")
    assert any("untied" in note for note in result.record.notes) == (tied and method == "head")
    if method == "head":
        assert result.record.trainable == before.lm_head.weight.numel()
    else:
        assert result.record.trainable == result.record.total == sum(p.numel() for p in before.parameters())


def test_ctrl_c_keeps_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, calls = Task.loss, []

    def interrupting(self: Task, model: Any, batch: Any) -> Any:
        calls.append(model.training)
        if calls.count(True) == 3:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    monkeypatch.setattr(Task, "loss", interrupting)
    result = run(tmp_path / "run", epochs=5)
    assert result.record.interrupted
    assert result.record.steps == 2
    loaded = PeftModel.from_pretrained(chat.model(), tmp_path / "run/last")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert json.loads((tmp_path / "run/result.json").read_text())["interrupted"] is True


def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupting(self: Task, model: Any, batch: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Task, "loss", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_does_not_wait_for_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, measured = Task.loss, []

    def interrupting(self: Task, model: Any, batch: Any) -> Any:
        if not model.training:
            measured.append(batch)
            if len(measured) == 5:
                os.kill(os.getpid(), signal.SIGINT)
        return loss(self, model, batch)

    monkeypatch.setattr(Task, "loss", interrupting)
    result = run(tmp_path / "run", eval_fraction=0.25, batch_size=1, eval_every=3)
    assert result.record.interrupted
    assert result.record.steps == 3
    assert result.record.held_out_after is None
    assert len(measured) == 5
    assert (tmp_path / "run/last/adapter_model.safetensors").is_file()


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="Could not write"):
        run(tmp_path / "file/run")


def test_a_loss_that_is_not_finite_names_its_batch_and_keeps_the_rest(tmp_path: Path) -> None:
    rows = [*chat.pairs(5), {"prompt": "what", "completion": "ß"}]
    model = chat.model()
    token = chat.tokenizer()("ß")["input_ids"][0]
    model.get_input_embeddings().weight.data[token] = float("nan")
    with pytest.raises(TrainingError, match=r"The loss is nan at step \d+, in the batch of example 6;") as caught:
        run(tmp_path / "run", rows=rows, model=model, batch_size=1, epochs=4, eval_fraction=0)
    step = int(str(caught.value).split(" at step ")[1].split(",")[0])
    assert (tmp_path / "run/last").exists() == (step > 1)
    assert events(tmp_path / "run", "error")[0]["step"] == step - 1


def test_an_infinite_gradient_stops_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Task.loss

    def exploding(self: Task, model: Any, batch: Any) -> Any:
        result = loss(self, model, batch)
        result.total.register_hook(lambda gradient: gradient * float("inf"))
        return result

    model = chat.model()
    monkeypatch.setattr(Task, "loss", exploding)
    with pytest.raises(TrainingError, match=r"The gradient's norm is (nan|inf) at step 1"):
        run(tmp_path / "run", model=model, eval_fraction=0)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_short_run_counts_by_steps_and_logs_sparsely(tmp_path: Path) -> None:
    result = run(tmp_path / "run", max_steps=5, log_every=2, eval_every=4)
    assert [event["step"] for event in events(tmp_path / "run", "step")] == [2, 4, 5]
    assert [event["step"] for event in events(tmp_path / "run", "eval")] == [0, 4, 5]
    assert result.record.steps == 5


def test_parts_of_an_epoch_count(tmp_path: Path) -> None:
    assert run(tmp_path / "run", epochs=0.67, eval_fraction=0).record.steps == 2


def test_without_held_out_data_only_the_last_is_kept(tmp_path: Path) -> None:
    result = run(tmp_path / "run", eval_fraction=0, max_steps=1)
    assert (result.record.best, result.record.held_out_before, result.record.held_out_after) == (None, None, None)
    assert not (tmp_path / "run/best").exists()
    assert any("Nothing is held out" in note for note in result.record.notes)


def test_from_files_with_a_plan_first(tmp_path: Path) -> None:
    chat.saved(tmp_path / "model", template=None)
    chat.written(tmp_path / "train.jsonl", chat.pairs(8))
    chat.written(tmp_path / "valid.jsonl", chat.pairs(3))
    chat.written(tmp_path / "test.jsonl", chat.pairs(2))
    plans = []
    result = train(
        RunConfig(model=str(tmp_path / "model"), data=str(tmp_path), output=str(tmp_path / "run"), max_steps=1, **FAST),
        on_ready=plans.append,
    )
    (plan,) = plans
    assert (plan.train_set.report.rows, plan.held_out.report.rows) == (8, 3)
    assert "train.jsonl is trained on, valid.jsonl is held out, test.jsonl is left alone" in plan.notes[0]
    assert "no chat template" in plan.notes[1]
    assert "".join(piece.text for piece in plan.preview() if piece.trained) == "the red is red<|end|>"
    assert result.record.model == str(tmp_path / "model")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/last")
    assert saved.chat_template == plan.tokenizer.chat_template


def test_the_models_own_limit_is_kept_and_told(tmp_path: Path) -> None:
    rows = [{"text": "stone " * 200}] * 3
    result = run(tmp_path / "run", rows=rows, max_steps=1)
    assert result.record.data["longest"] == 128
    assert any("takes 128 tokens at most" in note for note in result.record.notes)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"task": "casual_lm"}, ConfigError, "Did you mean 'causal_lm'"),
        ({"target_modules": ["q_porj"]}, TargetError, "q_proj"),
        ({"rows": []}, DataError, "list of examples is empty"),
        ({"rows": [{"prompt": "a"}]}, DataError, "example 1 has the columns prompt"),
        ({"rows": [{"prompt": "a " * 300, "completion": "b"}] * 3}, DataError, "all is masked"),
        ({"eval_data": "nowhere.jsonl"}, UsageError, "no file or folder 'nowhere.jsonl'"),
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_an_output_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="exists and is not empty"):
        run(tmp_path / "run")
    with pytest.raises(UsageError, match="is a file"):
        run(tmp_path / "run/thesis.txt")
    assert os.listdir(tmp_path / "run") == ["thesis.txt"]


def test_a_run_needs_a_model_and_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no model"):
        train(RunConfig(output=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="has no data"):
        train(RunConfig(output=str(tmp_path / "run"), model="m"))


def test_bad_rows_end_the_run_or_are_counted(tmp_path: Path) -> None:
    rows = [*chat.pairs(8), {"prompt": "no answer"}, {"prompt": 3, "completion": "x"}]
    with pytest.raises(DataError, match="example 9 has the columns prompt"):
        run(tmp_path / "fail", rows=rows)
    result = run(tmp_path / "skip", rows=rows, on_bad_row="skip", epochs=1)
    assert "2 bad rows are left out: example 9 has the columns prompt" in " ".join(result.record.notes)
    assert result.record.data["rows"] + result.record.held_out_data["rows"] == 8


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in chat.pairs(8)]
    result = run(tmp_path / "run", rows=rows, columns="prompt=question,completion=answer", epochs=1)
    assert result.record.data["rows"] == 7
