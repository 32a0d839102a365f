"""What a run does about memory: its optimiser, its precision, and what is computed twice, through the whole loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tests import chat
from veneer.core.errors import ConfigError
from veneer.engine import checkpointing, matmul, precision, room
from veneer.train.config import OptimiserName, RunConfig
from veneer.train.loop import RunResult, train
from veneer.train.savings import size


def run(folder: Path, *, model: Any = None, **settings: Any) -> RunResult:
    config = {"batch_size": 4, "learning_rate": 5e-3, "max_steps": 3, "schedule": "constant", "warmup": 0, **settings}
    return train(
        RunConfig(output=str(folder), target_modules="all-linear", **config),
        model=chat.model() if model is None else model,
        tokenizer=chat.tokenizer(),
        train_rows=chat.pairs(12),
    )


@pytest.mark.parametrize("name", get_args(OptimiserName))
def test_every_optimiser_runs_and_learns(tmp_path: Path, name: str) -> None:
    rate = 1.0 if name == "sgd" else 5e-3
    record = run(tmp_path / "run", optimizer=name, learning_rate=rate, max_steps=9).record
    assert record.held_out_after["loss"] < record.held_out_before["loss"]
    assert any("pages nothing on a CPU" in note for note in record.notes) == name.startswith("paged_")


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_auto_computes_in_what_was_measured(tmp_path: Path, faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(width: int, device: torch.device) -> precision.Speeds:
        asked.append((width, device.type))
        return precision.Speeds(64, {"fp32": 10.0, "bf16": 10.0, faster: 40.0})

    monkeypatch.setattr(precision, "measure", measured)
    auto = run(tmp_path / "auto", precision="auto")
    plain = run(tmp_path / "plain", precision=faster)
    assert asked == [(32, "cpu")]
    assert auto.record.notes[0].startswith(f"precision=auto is {faster}, by matmuls of 64 x 64: ")
    # Whoever goes on with this run finds the choice, not the question.
    assert RunConfig.read(tmp_path / "auto/run.yaml").precision == faster
    assert auto.record.train_loss == plain.record.train_loss


@pytest.mark.parametrize("faster", ["torch", "onednn"])
def test_auto_multiplies_with_what_was_measured(tmp_path: Path, faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"torch": 10.0, "onednn": 10.0, faster: 20.0}
    monkeypatch.setattr(matmul, "measure", lambda width: matmul.Matmuls(**rates, error=1e-7))
    monkeypatch.setattr(matmul, "check", lambda library: None)
    seen = []
    sets, before = torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda to: (seen.append(to), sets(to)))
    record = run(tmp_path / "run").record
    assert seen == (["medium", before] if faster == "onednn" else [])
    assert torch.get_float32_matmul_precision() == before
    assert record.notes[0].startswith("matmul=auto is onednn: ") == (faster == "onednn")
    assert RunConfig.read(tmp_path / "run/run.yaml").matmul == faster


@pytest.mark.parametrize("name", ["torch", "onednn"])
def test_either_library_learns_the_same(tmp_path: Path, name: str) -> None:
    asked, plain = run(tmp_path / "a", matmul=name).record, run(tmp_path / "b").record
    assert RunConfig.read(tmp_path / "a/run.yaml").matmul == name
    # A narrow model has nothing to gain, and auto leaves it to torch.
    assert RunConfig.read(tmp_path / "b/run.yaml").matmul == "torch"
    assert asked.train_loss == pytest.approx(plain.train_loss, rel=1e-5)


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in result.model.named_parameters() if p.requires_grad}


def noted(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "checkpoint"]


@pytest.mark.parametrize("checkpoint", ["on", "1", "2"])
def test_checkpointing_changes_no_bit(tmp_path: Path, checkpoint: str) -> None:
    plain = run(tmp_path / "a", lora_dropout=0.2)
    result = run(tmp_path / "b", lora_dropout=0.2, checkpoint=checkpoint)
    assert not result.model.is_gradient_checkpointing
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(result)[name])


def test_auto_takes_as_few_layers_as_the_limit_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit just above what the process holds: with room for all, for some, and for none of the layers."""
    monkeypatch.setattr(room, "held", lambda device: 1_000_000_000)
    chosen: list[int | None] = []
    real = checkpointing.checkpoint_layers

    def watched(model: Any, count: int | None = None) -> None:
        chosen.append(count)
        real(model, count)

    monkeypatch.setattr(checkpointing, "checkpoint_layers", watched)
    plain = run(tmp_path / "plain", lora_dropout=0.2)
    limit = "2GB"
    for layers in (0, 1, 2):
        chosen.clear()
        folder = tmp_path / str(layers)
        result = run(folder, checkpoint="auto", memory_limit=limit, lora_dropout=0.2)
        (note,) = noted(folder)
        assert note["layers"] == layers
        assert note["message"].startswith("checkpoint=auto: the largest batch takes ")
        assert f"{layers} of 2 are checkpointed" in note["message"]
        assert ("Even so" in note["message"]) == (layers == 2)
        # All of them for the pass that is measured, and then those of the run.
        assert chosen == [None, 0, *([layers, 0] if layers else [])]
        # What was needed fits; with one byte less another layer is computed twice, or all are and it is said.
        limit = f"{(note['needed'] - 1) / 1e3:.3f}KB" if not layers else "1GB"
        for name, tensor in weights(plain).items():
            assert torch.equal(tensor, weights(result)[name])


def test_auto_without_a_limit_takes_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "held", lambda device: 1_000_000_000)
    monkeypatch.setattr(room, "free", lambda device: 2_000_000_000)
    run(tmp_path / "run", checkpoint="auto")
    assert "to stay within 2.80 GB, 0 of 2" in noted(tmp_path / "run")[0]["message"]
    monkeypatch.setattr(room, "free", lambda device: None)
    with pytest.raises(ConfigError, match="needs a memory_limit here"):
        run(tmp_path / "other", checkpoint="auto")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("text", "count"), [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("512MiB", 2**29), ("10KB", 10**4), ("1TB", 10**12)]
)
def test_sizes(text: str, count: int) -> None:
    assert size(text) == count


def test_old_and_other_spellings() -> None:
    def checkpoint(**given: Any) -> str:
        return RunConfig(output="x", target_modules="all-linear", **given).checkpoint

    assert checkpoint() == checkpoint(gradient_checkpointing=False) == checkpoint(checkpoint=False) == "off"
    assert checkpoint(gradient_checkpointing=True) == checkpoint(checkpoint=True) == "on"
    assert checkpoint(checkpoint=3) == checkpoint(checkpoint="3") == "3"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint": "some"}, "checkpoint is 'some'"),
        ({"checkpoint": 0}, "checkpoint is '0'"),
        ({"checkpoint": "on", "gradient_checkpointing": True}, "Both checkpoint and gradient_checkpointing"),
        ({"memory_limit": "4GB"}, "memory_limit has no meaning with checkpoint=off"),
        ({"memory_limit": "4", "checkpoint": "auto"}, "memory_limit is '4'"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig(output="x", target_modules="all-linear", **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint": "3"}, "checkpoint is 3, but LlamaForCausalLM has 2 layers"),
        ({"offload_activations": True}, "offload_activations moves activations from a GPU .* this run is on cpu"),
    ],
)
def test_what_this_model_or_machine_cannot_is_refused(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
