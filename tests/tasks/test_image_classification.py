from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from sklearn import metrics as truth

from tests import pictures
from veneer import AutoPeftModel
from veneer.cli.main import main
from veneer.core.errors import ConfigError, DataError, UsageError
from veneer.data.rows import Row
from veneer.data.sources import read_rows, rows_of
from veneer.tasks import task as tasks
from veneer.tasks.options import TaskOptions
from veneer.train.config import RunConfig
from veneer.train.loop import train

ALL = tuple(pictures.COLOURS)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.saved(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pictures.folder(tmp_path / "colours")


def fitted(rows: list[Row], **options: Any) -> Any:
    return tasks.get("image_classification").fitted(rows, TaskOptions(**options), pictures.config())


def told(kind: str, at: int, colour: str) -> Any:
    return {"single": colour, "multi": [colour, "odd"][: 1 + at % 2], "regression": 0.5 + (colour == "red")}[kind]


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_the_loss_is_that_of_transformers(kind: str, vit: Path) -> None:
    colours = [("red", "green")[at % 2] for at in range(6)]
    rows = rows_of(
        {"image": pictures.image(colour, at), "label": told(kind, at, colour)} for at, colour in enumerate(colours)
    )
    task = fitted(rows)
    assert task.labels.kind == kind
    model, processor = task.model(str(vit)).eval(), task.processor(str(vit))
    examples = task.encode(rows, processor, max_length=64, train_on="completion").examples
    batch = task.collate(examples, processor)
    theirs = processor(images=[pictures.image(c, at) for at, c in enumerate(colours)], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], theirs["pixel_values"])
    found = task.loss(model, batch)
    torch.testing.assert_close(found.total / task.units(batch), model(**batch).loss, rtol=1e-5, atol=1e-5)
    assert found.tally.units == 6


@pytest.mark.parametrize("batch_size", [1, 5])
def test_figures_are_those_of_scikit_learn(batch_size: int, vit: Path, tmp_path: Path) -> None:
    rows = read_rows(pictures.folder(tmp_path / "all", ALL, count=3))
    task = fitted(rows)
    torch.manual_seed(1)
    model, processor = task.model(str(vit)), task.processor(str(vit))
    examples = task.encode(rows, processor, max_length=64, train_on="completion").examples
    found = tasks.measure(task, model, examples, processor, batch_size=batch_size, device="cpu")
    said = tasks.predict(task, model, examples, processor, batch_size=batch_size, device="cpu")
    assert set(found.metrics) == set(task.goals)
    right, guessed = [row.values["label"] for row in rows], [one["label"] for one in said]
    assert found.metrics["accuracy"] == pytest.approx(truth.accuracy_score(right, guessed))
    among = [label in sorted(one["scores"], key=one["scores"].get)[-5:] for label, one in zip(right, said, strict=True)]
    assert found.metrics["top5_accuracy"] == pytest.approx(sum(among) / len(among))
    assert 0 < found.metrics["top5_accuracy"] < 1
    names = list(task.labels.names)
    assert found.details["confusion"]["counts"] == truth.confusion_matrix(right, guessed, labels=names).tolist()
    assert "top5_accuracy" not in fitted(read_rows(tmp_path / "all"), labels=None, problem="multi").goals


def test_a_model_of_grey_images_gets_them(tmp_path: Path) -> None:
    folder = pictures.saved(tmp_path / "vit", num_channels=1)
    rows = read_rows(pictures.folder(tmp_path / "colours", count=1))
    task = tasks.get("image_classification").fitted(rows, TaskOptions(), pictures.config(num_channels=1))
    assert task.restored(task.to_dict()) == task
    model, processor = task.model(str(folder)), task.processor(str(folder))
    batch = task.collate(task.encode(rows, processor, max_length=1, train_on="all").examples, processor)
    assert batch["pixel_values"].shape == (2, 1, 16, 16)
    assert task.loss(model, batch).tally.units == 2


def test_what_datasets_stored_is_read(vit: Path, tmp_path: Path) -> None:
    rows = [{"image": pictures.image(c, at), "label": c} for at in range(2) for c in ("red", "green")]
    made = datasets.Dataset.from_list(rows)
    assert isinstance(made.features["image"], datasets.Image)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    sets = []
    for place in (tmp_path / "a.parquet", tmp_path / "saved"):
        read = read_rows(place)
        task = fitted(read)
        sets.append(task.encode(read, None, max_length=1, train_on="all").fingerprint)
    direct = rows_of(made)
    sets.append(fitted(direct).encode(direct, None, max_length=1, train_on="all").fingerprint)
    assert len(set(sets[:2])) == 1
    run = train(
        RunConfig(
            model=str(vit),
            data=str(tmp_path / "saved"),
            output=str(tmp_path / "run"),
            task="image_classification",
            max_steps=1,
        )
    )
    assert run.record.steps == 1


@pytest.mark.parametrize("method", [{"method": "full"}, {"method": "head"}, {"r": 4}, {"use_dora": True}], ids=str)
def test_every_method_learns_and_comes_back_with_its_labels(
    method: dict[str, Any], vit: Path, data: Path, tmp_path: Path
) -> None:
    result = train(
        RunConfig(
            model=str(vit),
            data=str(data),
            output=str(tmp_path / "run"),
            task="image_classification",
            eval_data=str(data),
            max_steps=20,
            eval_every=20,
            batch_size=4,
            learning_rate=0.01,
            **method,
        )
    )
    before, after = result.record.held_out_before, result.record.held_out_after
    assert before is not None
    assert after is not None
    assert after["loss"] < before["loss"]
    assert json.loads((tmp_path / "run" / "best" / "task.json").read_text())["labels"] == ["green", "red"]
    adapted = method.get("method") is None
    given = ["--adapter", str(tmp_path / "run")] if adapted else ["--model", str(tmp_path / "run" / "best")]
    out = tmp_path / "said.jsonl"
    assert main(["predict", *given, "--data", str(data / "red"), "--output", str(out)]) == 0
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["origin"] for one in said] == [f"red/{at}.png" for at in range(6)]
    assert {one["label"] for one in said} <= {"green", "red"}
    if adapted:
        loaded = AutoPeftModel.from_pretrained(tmp_path / "run" / "best")
        assert loaded.config.id2label == {0: "green", 1: "red"}


@pytest.mark.filterwarnings("default:This merge cannot go tensor by tensor")
def test_merged_it_predicts_the_same(vit: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    flags = ["--task", "image_classification", "--max-steps", "3", "--learning-rate", "0.01"]
    assert main(["train", "--model", str(vit), "--data", str(data), "--output", run, *flags]) == 0
    assert (tmp_path / "run" / "confusion.png").stat().st_size > 1000
    assert main(["merge", "--model", str(vit), "--adapter", run, "--output", merged]) == 0
    assert "no tokenizer" not in capsys.readouterr().err
    outputs = []
    for given in (["--adapter", run], ["--model", merged]):
        capsys.readouterr()
        assert main(["predict", *given, "--data", str(data), "--json"]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["predictions"])
        assert main(["eval", *given, "--data", str(data), "--plot", str(tmp_path / f"{len(outputs)}.png")]) == 0
    for one, other in zip(*outputs, strict=True):
        assert one["label"] == other["label"]
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-4)
    assert transformers.AutoModelForImageClassification.from_pretrained(merged).config.id2label[1] == "red"


def test_a_broken_image_is_named_or_left_out(
    vit: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = data / "red" / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    flags = ["--model", str(vit), "--data", str(data), "--task", "image_classification", "--max-steps", "1"]
    assert main(["train", *flags, "--output", str(tmp_path / "a")]) == 1
    assert "colours/red/0.png has no whole image" in capsys.readouterr().err
    assert main(["train", *flags, "--output", str(tmp_path / "b"), "--on-bad-row", "skip"]) == 0
    assert "1 bad rows are left out" in " ".join(capsys.readouterr().out.split())


def test_what_is_missing_is_told(vit: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows(data)
    with pytest.raises(ConfigError, match="prefix has no meaning for task image_classification"):
        fitted(rows, prefix="a")
    with pytest.raises(DataError, match="has label = 'green'; expected one of the labels red, yellow"):
        fitted(rows, labels="red,yellow")
    task = fitted(rows)
    processor = task.processor(str(vit))
    examples = task.encode(rows, processor, max_length=1, train_on="all").examples
    (data / "red" / "0.png").unlink()
    with pytest.raises(DataError, match=r"red/0\.png.*cannot be read any more"):
        task.collate(examples, processor)
    (data / "red" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        task.collate(examples, processor)
    pictures.image("red").resize((9, 9)).save(data / "red" / "0.png")
    processor.do_resize = False
    with pytest.raises(DataError, match=r"colours/red/0\.png is made \(3, 9, 9\) .* and colours/green/0\.png"):
        task.collate(examples[:7], processor)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "PIL" else object())
    with pytest.raises(UsageError, match=r"pip install 'veneer\[images\]'"):
        fitted(rows)


def test_weights_and_order_of_labels(data: Path) -> None:
    rows = read_rows(data)
    assert fitted(rows, labels="red,green").labels.names == ("red", "green")
    assert fitted(rows, class_weights="red=3").labels.weights == pytest.approx((0.5, 1.5))
    assert fitted(rows, problem="single").labels.kind == "single"


def test_the_example_that_is_shown_names_its_file(data: Path) -> None:
    rows = read_rows(data)
    task = fitted(rows)
    (example, *_) = task.encode(rows[:1], None, max_length=1, train_on="all").examples
    shown = task.preview(example, None)
    assert [piece.trained for piece in shown] == [False, True]
    assert "green/0.png" in shown[0].text
    assert shown[1].text == " green"
