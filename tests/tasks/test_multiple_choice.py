from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import chat, words
from veneer import PeftConfig
from veneer.cli.main import main
from veneer.core.errors import ConfigError
from veneer.data.sources import rows_of
from veneer.tasks import task as tasks
from veneer.tasks.multiple_choice import Task
from veneer.tasks.options import TaskOptions
from veneer.train.config import RunConfig
from veneer.train.loop import train

HOW: dict[str, Any] = {"max_length": 64, "train_on": "completion"}
KINDS = ("encoder", "likelihood")


def rows(kind: str, count: int = 20, *, unequal: bool = False) -> list[dict[str, Any]]:
    """Questions whose right choice can be learned."""
    good, bad = (("good", "fine"), ("bad", "poor", "not")) if kind == "encoder" else (("red",), ("blue", "two", "so"))
    found = []
    for at in range(count):
        number = 2 + at % 2 if unequal else 3
        right = at % number
        choices = [f"{'the ' * (at % 2)}{good[at % len(good)] if n == right else bad[n]}" for n in range(number)]
        found.append({"question": f"{'and so ' * (at % 3)}the river is", "choices": choices, "answer": right})
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "encoder": words.saved(tmp_path_factory.mktemp("bert")),
        "likelihood": chat.saved(tmp_path_factory.mktemp("llama")),
    }


def written(path: Path, some: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def ready(kind: str, models: dict[str, Path]) -> tuple[Task, Any, Any]:
    config = transformers.AutoConfig.from_pretrained(models[kind])
    task = tasks.get("multiple_choice").fitted([], TaskOptions(), config)
    assert isinstance(task, Task)
    assert task.likelihood == (kind == "likelihood")
    return task, task.model(str(models[kind])).eval(), task.processor(str(models[kind]))


def test_the_loss_is_that_of_transformers(models: dict[str, Path]) -> None:
    task, model, processor = ready("encoder", models)
    examples = task.encode(rows_of(rows("encoder")), processor, **HOW).examples[:5]
    batch = task.collate(examples, processor)
    assert batch["input_ids"].shape[:2] == (5, 3)
    found = task.loss(model, batch)
    expected = model(**{key: value for key, value in batch.items() if key != "real"}).loss
    torch.testing.assert_close(found.total / task.units(batch), expected, atol=1e-6, rtol=1e-5)
    assert found.tally.units == 5


def scores_one_by_one(model: Any, processor: Any, row: dict[str, Any]) -> torch.Tensor:
    """A choice's mean log-probability, token by token."""
    found = []
    given = processor(row["question"])["input_ids"]
    for text in row["choices"]:
        ids = processor(f"{row['question']} {text}")["input_ids"]
        assert ids[: len(given)] == given
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        each = [logits[at - 1, ids[at]] for at in range(len(given), len(ids))]
        found.append(torch.stack(each).mean())
    return torch.stack(found)


@pytest.mark.parametrize("unequal", [False, True])
def test_likelihoods_are_those_of_a_loop(unequal: bool, models: dict[str, Path]) -> None:
    task, model, processor = ready("likelihood", models)
    given = rows("likelihood", 6, unequal=unequal)
    batch = task.collate(task.encode(rows_of(given), processor, **HOW).examples, processor)
    each = [scores_one_by_one(model, processor, row) for row in given]
    expected = sum(-scores.log_softmax(0)[row["answer"]] for scores, row in zip(each, given, strict=True))
    assert isinstance(expected, torch.Tensor)
    found = task.loss(model, batch)
    torch.testing.assert_close(found.total, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found.total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4)
    said = tasks.predict(
        task,
        model,
        task.encode(rows_of(given), processor, **HOW, labelled=False).examples,
        processor,
        batch_size=4,
        device="cpu",
    )
    assert [one["choice"] for one in said] == [int(scores.argmax()) for scores in each]
    for one, scores, row in zip(said, each, given, strict=True):
        assert one["scores"] == pytest.approx(scores.softmax(0).tolist(), abs=1e-5)
        assert one["answer"] == row["choices"][one["choice"]]


@pytest.mark.parametrize("kind", KINDS)
def test_choices_of_unequal_number_count_as_they_would_alone(kind: str, models: dict[str, Path]) -> None:
    task, model, processor = ready(kind, models)
    given = rows(kind, 6, unequal=True)
    examples = task.encode(rows_of(given), processor, **HOW).examples
    with torch.no_grad():
        together = float(task.loss(model, task.collate(examples, processor)).total)
        alone = [float(task.loss(model, task.collate([example], processor)).total) for example in examples]
    assert together == pytest.approx(sum(alone), abs=1e-5)
    same, notes = task.prepare(rows_of(given), processor)
    assert same is processor
    assert notes == ["Rows have choices of unequal number: example 1 has 2 and example 2 has 3."]
    assert task.prepare(rows_of([*rows(kind), {"question": "x"}]), processor)[1] == []


METHODS: list[dict[str, Any]] = [{"method": "full"}, {"method": "head"}, {"r": 4}, {"use_dora": True}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m)))
def test_every_method_learns_and_comes_back(
    kind: str, method: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    data = written(tmp_path / "train.jsonl", rows(kind))
    config = RunConfig(
        model=str(models[kind]),
        data=str(data),
        output=str(tmp_path / "run"),
        task="multiple_choice",
        eval_data=str(data),
        max_steps=30,
        eval_every=30,
        best_metric="accuracy",
        **{"learning_rate": 0.01, **method},
    )
    result = train(config)
    before, after = result.record.held_out_before, result.record.held_out_after
    assert before is not None
    assert after is not None
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > 0.8
    kept = json.loads((tmp_path / "run" / "last" / "task.json").read_text())
    assert kept == {"task": "multiple_choice", "likelihood": kind == "likelihood"}
    adapted = "method" not in method
    given = ["--adapter", str(tmp_path / "run")] if adapted else ["--model", str(tmp_path / "run" / "last")]
    plain = [{"question": row["question"], "choices": row["choices"]} for row in rows(kind, 6)]
    out = tmp_path / "said.jsonl"
    assert main(["predict", *given, "--data", str(written(tmp_path / "new.jsonl", plain)), "--output", str(out)]) == 0
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["origin"] for one in said] == [f"new.jsonl:{at}" for at in range(1, 7)]
    if adapted:
        about = PeftConfig.from_pretrained(tmp_path / "run" / "last")
        assert about.task_type == ("CAUSAL_LM" if kind == "likelihood" else "MULTIPLE_CHOICE")
        # Of a language model no head is trained.
        assert bool(about.modules_to_save) == (kind == "encoder")


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_predicts_the_same(
    kind: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path / "train.jsonl", rows(kind, unequal=True))
    asked = ["train", "--model", str(models[kind]), "--data", str(data), "--output", str(tmp_path / "run")]
    assert main([*asked, "--task", "multiple_choice", "--max-steps", "3", "--learning-rate", "0.01"]) == 0
    assert "choices of unequal number" in capsys.readouterr().out
    merged = tmp_path / "merged"
    given = ["--model", str(models[kind]), "--adapter", str(tmp_path / "run"), "--output", str(merged), "--verify"]
    assert main(["merge", *given]) == 0
    outputs, figures = [], []
    for subject in (["--adapter", str(tmp_path / "run")], ["--model", str(merged)]):
        capsys.readouterr()
        assert main(["predict", *subject, "--data", str(data), "--json"]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["predictions"])
        assert main(["eval", *subject, "--data", str(data), "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    for one, other in zip(*outputs, strict=True):
        assert one["choice"] == other["choice"]
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-4)
    assert figures[0]["accuracy"] == figures[1]["accuracy"]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-4)


def test_what_is_wrong_is_named(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = rows("encoder")
    some[4] = {**some[4], "answer": 7}
    asked = ["train", "--model", str(models["encoder"]), "--data", str(written(tmp_path / "a.jsonl", some))]
    assert main([*asked, "--output", str(tmp_path / "run"), "--task", "multiple_choice"]) == 1
    assert "a.jsonl:5 has answer = 7, none of its 3 choices" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="labels has no meaning for task multiple_choice"):
        Task().fitted([], TaskOptions(labels="a,b"), None)
    with pytest.raises(ConfigError, match="A model of type t5 has no head for multiple choice"):
        Task().fitted([], TaskOptions(), transformers.T5Config())
    with pytest.raises(ConfigError, match="A model of type vit has no head"):
        Task().described(transformers.ViTConfig())


def test_evas_directions_are_of_real_tokens_only(models: dict[str, Path], tmp_path: Path) -> None:
    data = written(tmp_path / "train.jsonl", rows("encoder"))
    config = RunConfig(
        model=str(models["encoder"]),
        data=str(data),
        output=str(tmp_path / "run"),
        task="multiple_choice",
        max_steps=2,
        r=2,
        init_lora_weights="eva",
    )
    assert math.isfinite(train(config).record.train_loss or math.nan)


@pytest.mark.parametrize("kind", KINDS)
def test_the_preview_shows_the_right_choice(kind: str, models: dict[str, Path]) -> None:
    task, _, processor = ready(kind, models)
    example = task.encode(rows_of(rows(kind, 2)), processor, **HOW).examples[1]
    trained = [piece.text for piece in task.preview(example, processor) if piece.trained]
    assert len(trained) == 1
    assert trained[0].startswith("B. ")
    assert rows(kind, 2)[1]["choices"][1] in trained[0]
