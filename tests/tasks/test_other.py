from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.cli.main import main
from veneer.core.errors import CodeError, ConfigError, DataError, UsageError
from veneer.data.sources import rows_of
from veneer.tasks import task as tasks
from veneer.tasks.options import TaskOptions
from veneer.tasks.program import Program
from veneer.train.config import RunConfig
from veneer.train.loop import train

CODE = """
import torch
from torch import nn

TARGET_MODULES = ["0"]

def load_model(name):
    torch.manual_seed(len(name))
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

def collate(examples, processor):
    batch = {"x": torch.tensor([e["x"] for e in examples])}
    if examples[0].get("y") is not None:
        batch["y"] = torch.tensor([e["y"] for e in examples])
    return batch

def loss(model, batch):
    return (model(batch["x"]).squeeze(-1) - batch["y"]).abs()
"""
PREDICT = """
def predict(model, batch):
    return [{"y": y} for y in model(batch["x"]).squeeze(-1).tolist()]
"""
METRICS = """
METRICS = {"worst": "min"}

def metrics(predictions, examples):
    return {"worst": max(abs(p["y"] - e["y"]) for p, e in zip(predictions, examples))}
"""
ENCODE = """
def load_processor(name):
    return 2.0

def encode(row, processor):
    return {"x": [processor * row["a"], row["b"]], "y": row.get("y")}
"""


def rows(count: int = 10) -> list[dict[str, Any]]:
    return [{"x": [at / 10, 1 - at / 5], "y": at / 7} for at in range(count)]


def written(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "my_task.py"
    path.write_text(CODE + PREDICT + METRICS)
    return path


def fitted(code: Path) -> Any:
    return tasks.get("other").fitted(rows_of(rows()), TaskOptions(code=str(code)), None)


def run(code: Path, folder: Path, **more: Any) -> Any:
    data = written(folder / "train.jsonl", rows())
    given = {"model": "seven", "data": str(data), "task": "other", "code": str(code), "output": str(folder / "run")}
    return train(RunConfig(**{**given, "eval_data": str(data), "max_steps": 20, "learning_rate": 0.02, **more}))


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_figures_are_those_of_the_code(batch_size: int, code: Path) -> None:
    task = fitted(code)
    model = task.model("seven")
    examples = task.encode(rows_of(rows()), None, max_length=9, train_on="all").examples
    found = tasks.measure(task, model, examples, None, batch_size=batch_size, device="cpu").metrics
    with torch.no_grad():
        x, y = torch.tensor([row["x"] for row in rows()]), torch.tensor([row["y"] for row in rows()])
        errors = (model(x).squeeze(-1) - y).abs()
    assert found == {"loss": pytest.approx(float(errors.mean())), "worst": pytest.approx(float(errors.max()))}
    assert set(task.goals) == {"loss", "worst"}


def test_what_is_saved_is_an_adapter_of_the_codes_own_model(code: Path, tmp_path: Path) -> None:
    from veneer import PeftModel

    run(code, tmp_path, max_steps=3, optimizer="sgd", clip=None, schedule="constant", warmup=0, batch_size=10, keep=0)
    trained = PeftModel.from_pretrained(fitted(code).model("seven"), tmp_path / "run" / "last")
    layer = trained.base_model.model[0]
    A, B = (getattr(layer, f"lora_{name}")["default"].weight for name in "AB")
    start = torch.nn.Sequential(*copy.deepcopy(list(fitted(code).model("seven"))))
    x, y = torch.tensor([row["x"] for row in rows()]), torch.tensor([row["y"] for row in rows()])
    assert B.abs().max() > 0
    with torch.no_grad():
        expected = start[0](x) + (x @ A.T @ B.T) * layer.scaling["default"]
        expected = start[2](expected.tanh()).squeeze(-1)
    torch.testing.assert_close(trained(x).squeeze(-1), expected)
    assert (expected - y).abs().mean() < (start(x).squeeze(-1) - y).abs().mean()


@pytest.mark.parametrize("workers", [0, 1])
def test_it_learns_and_comes_back(code: Path, tmp_path: Path, workers: int) -> None:
    record = run(code, tmp_path, workers=workers, best_metric="worst").record
    assert record.held_out_before is not None
    assert record.held_out_after is not None
    assert record.held_out_after["loss"] < record.held_out_before["loss"]
    adapter = ["--adapter", str(tmp_path / "run")]
    out, data = tmp_path / "said.jsonl", written(tmp_path / "new.jsonl", [{"x": row["x"]} for row in rows()])
    assert main(["predict", *adapter, "--code", str(code), "--data", str(data), "--output", str(out)]) == 0
    said = [json.loads(line)["y"] for line in out.read_text().splitlines()]
    worst = max(abs(y - row["y"]) for y, row in zip(said, rows(), strict=True))
    # The base is the one that the adapter names, and it is the best adapter that is taken.
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert worst == pytest.approx(min(event["worst"] for event in log if event["event"] == "eval"), rel=1e-5)


def test_rows_are_made_examples_by_the_code(tmp_path: Path) -> None:
    code = tmp_path / "my_task.py"
    code.write_text(CODE + ENCODE)
    task = fitted(code)
    processor = task.processor("seven")
    (example,) = task.encode(rows_of([{"a": 3, "b": 1, "y": 2}]), processor, max_length=9, train_on="all").examples
    assert example.more == {"example": {"x": [6.0, 1], "y": 2}}
    with pytest.raises(DataError, match=r"encode in my_task.py, line \d+, failed on example 1: KeyError: 'a'") as error:
        task.encode(rows_of([{"b": 1}]), processor, max_length=9, train_on="all")
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(DataError, match="JSON can hold"):
        task.encode(rows_of([{"a": 1, "b": {1}}]), processor, max_length=9, train_on="all")
    data = written(tmp_path / "some.jsonl", [{"a": 1, "b": 2.0, "y": 1.0}, {"b": 1}])
    config = RunConfig(
        **{"model": "seven", "data": str(data), "task": "other", "code": str(code), "output": str(tmp_path / "run")},
        **{"on_bad_row": "skip", "eval_fraction": 0, "max_steps": 1},
    )
    record = train(config).record
    assert record.data["examples"] == 1
    assert any("some.jsonl:2" in note and "KeyError" in note for note in record.notes)


def test_without_predict_there_is_nothing_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = tmp_path / "my_task.py"
    code.write_text(CODE)
    assert set(run(code, tmp_path, max_steps=1).record.held_out_after) == {"loss"}
    given = ["--adapter", str(tmp_path / "run"), "--data", str(tmp_path / "train.jsonl")]
    assert main(["predict", *given, "--code", str(code)]) == 2
    assert "has no predict(model, batch)" in capsys.readouterr().err


@pytest.mark.filterwarnings("default:.* is not as it was when the weights")
def test_code_is_run_only_when_it_is_named(code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(code, tmp_path, max_steps=1)
    given = ["eval", "--adapter", str(tmp_path / "run"), "--data", str(tmp_path / "train.jsonl")]
    assert main(given) == 2
    assert "give --code my_task.py. It was my_task.py when" in capsys.readouterr().err
    other = tmp_path / "changed.py"
    other.write_text(code.read_text() + "\n")
    assert main([*given, "--code", str(other)]) == 0
    said = capsys.readouterr().err
    assert "changed.py is not as it was when the weights were trained with my_task.py" in said
    assert main([*given, "--code", str(code)]) == 0
    assert "not as it was" not in capsys.readouterr().err
    assert (
        main(["data", str(tmp_path / "train.jsonl"), "--model", "seven", "--task", "other", "--code", str(code)]) == 0
    )
    with pytest.raises(ConfigError, match="code has no meaning for task causal_lm"):
        tasks.get("causal_lm").fitted(rows_of(rows()), TaskOptions(code="x.py"), None)
    with pytest.raises(UsageError, match="give --code"):
        tasks.get("other").fitted(rows_of(rows()), TaskOptions(), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CODE.replace("def collate", "def colate"), r"has no function collate. Did you mean.*colate"),
        ("x = (", "could not be run: SyntaxError"),
        ("import nowhere_at_all", r"line 1, could not be run: ModuleNotFoundError"),
        (CODE + "loss = 3", "loss in my_task.py is a int; expected a function|has no function loss"),
        (CODE + METRICS, "has METRICS, but no predict"),
        (CODE + PREDICT + METRICS.replace('"min"', '"low"'), "expected names with min or max"),
    ],
)
def test_code_that_is_not_whole_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my_task.py"
    path.write_text(text)
    with pytest.raises(CodeError, match=message):
        Program(path)
    with pytest.raises(UsageError, match=r"There is no code file.*my_task.py"):
        Program(tmp_path / "my_tsk.py")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (".abs()", ".abs().mean()", r"loss in my_task.py gave a Tensor of shape \(\); expected .* 10 examples"),
        (".abs()", ".abs().detach()", "no gradient leads to the model"),
        ('batch["y"])', 'batch["z"])', r"loss in my_task.py, line \d+, failed: KeyError: 'z'"),
        ("return batch", "return [batch]", "collate in my_task.py gave a list on example 1"),
        ('e["x"] for', 'e["w"] for', r"collate in my_task.py, line \d+, failed on example 1, .*: KeyError: 'w'"),
        ("return nn.Sequential", "return lambda *x: None  # ", "load_model in my_task.py gave a function"),
        ('"worst": max', '"best": max', "metrics in my_task.py gave best; METRICS has worst"),
        ('return [{"y": y} for', "return [y for", "predict in my_task.py gave a list; expected a list of 10 dicts"),
    ],
)
def test_what_the_code_does_wrong_is_told(before: str, after: str, message: str, code: Path) -> None:
    code.write_text(code.read_text().replace(before, after))
    task = fitted(code)
    examples = task.encode(rows_of(rows()), None, max_length=9, train_on="all").examples

    def use() -> None:
        model = task.model("seven")
        task.loss(model, task.collate(examples, None))
        tasks.measure(task, model, examples, None, batch_size=10, device="cpu")

    with pytest.raises(CodeError, match=message):
        use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full"}, "method=full saves a whole model.*Sequential"),
        ({"method": "head"}, "method=head saves a whole model"),
        ({"precision": "bf16"}, "dtype bfloat16 has no meaning here"),
        ({"quantize": "nf4"}, "quantize=nf4 has no meaning here"),
        ({"checkpoint": "on"}, "Sequential does not support gradient checkpointing"),
        ({"packing": "on"}, "packing=on is not possible"),
        ({"labels": "a,b"}, "labels has no meaning for task other"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, code: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(code, tmp_path, **options)
    assert not (tmp_path / "run").exists()


def test_it_goes_to_other_processes(code: Path) -> None:
    again = pickle.loads(pickle.dumps(fitted(code)))
    assert again.to_dict() == fitted(code).to_dict()
