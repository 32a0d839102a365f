from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jiwer
import pytest
import soundfile
import torch
import transformers

from tests import speech
from veneer import AutoPeftModel
from veneer.cli.main import main
from veneer.core.errors import ConfigError, DataError
from veneer.data.rows import Row
from veneer.data.sources import read_rows, rows_of
from veneer.tasks import task as tasks
from veneer.tasks.options import TaskOptions
from veneer.tasks.sampling import Sampling
from veneer.tasks.writing import write
from veneer.train.config import RunConfig
from veneer.train.loop import train


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speech.saved(tmp_path_factory.mktemp("whisper"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return speech.folder(tmp_path / "clips")


def fitted(rows: list[Row], config: Any = None, **options: Any) -> Any:
    return tasks.get("speech_seq2seq").fitted(rows, TaskOptions(**options), config or speech.config())


def clips(count: int = 6) -> list[Row]:
    words = [("low", "high")[at % 2] for at in range(count)]
    return rows_of(
        {"audio": {"bytes": speech.encoded(w, seconds=0.1 * at + 0.1)}, "text": w} for at, w in enumerate(words)
    )


def theirs(model: Any, rows: list[Row], processor: Any) -> list[tuple[float, int]]:
    """The loss of each row by transformers' own recipe, and its tokens."""
    found = []
    for row in rows:
        samples, rate = soundfile.read(io.BytesIO(row.values["audio"]["bytes"]), dtype="float32")
        given = processor.feature_extractor(samples, sampling_rate=rate, return_tensors="pt").input_features
        labels = torch.tensor([processor.tokenizer(row.values["text"]).input_ids])
        if (labels[:, 0] == model.config.decoder_start_token_id).all():
            labels = labels[:, 1:]
        with torch.no_grad():
            found.append((model(input_features=given, labels=labels).loss.item(), labels.numel()))
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_is_that_of_transformers(batch_size: int) -> None:
    model, processor, rows = speech.model().eval(), speech.processor(), clips()
    task = fitted(rows)
    examples = task.encode(rows, processor, max_length=64, train_on="all").examples
    each = theirs(model, rows, processor)
    tokens = sum(count for _, count in each)
    found = tasks.measure(task, model, examples, processor, batch_size=batch_size, device="cpu")
    assert found.tally.units == tokens
    assert found.metrics["loss"] == pytest.approx(sum(loss * count for loss, count in each) / tokens, rel=1e-5)
    assert set(found.metrics) == set(task.goals)


def test_transcripts_have_whispers_prompt_without_the_start() -> None:
    rows, processor = clips(1), speech.processor()
    (example,) = fitted(rows).encode(rows, processor, max_length=64, train_on="all").examples
    assert example.labels == [
        speech.NO_TIMES,
        *processor.tokenizer("low", add_special_tokens=False).input_ids,
        speech.END,
    ]
    assert [piece.trained for piece in fitted(rows).preview(example, processor)] == [False, True]


@pytest.mark.parametrize(("languages", "way"), [("de", "transcribe"), ("de-en", "translate"), ("de-de", "transcribe")])
def test_a_model_of_many_languages_is_told_which(languages: str, way: str) -> None:
    rows, processor = clips(3), speech.processor()
    model = speech.model(speech.MANY).eval()
    with pytest.raises(ConfigError, match="knows many languages; give the one that is spoken"):
        fitted(rows, model.config)
    task = fitted(rows, model.config, languages=languages)
    assert task.restored(task.to_dict()) == task
    processor, _ = task.prepare(rows, processor)
    (example, *_) = examples = task.encode(rows, processor, max_length=64, train_on="all").examples
    marks = [speech.GERMAN, {"transcribe": speech.TRANSCRIBE, "translate": speech.TRANSLATE}[way], speech.NO_TIMES]
    assert example.labels[:3] == marks
    losses = [loss for loss, _ in theirs(model, rows, processor)]
    found = task.loss(model, task.collate(examples[:1], processor))
    assert found.total.item() / found.tally.units == pytest.approx(losses[0], rel=1e-5)
    (asked, *_) = task.ask(rows, processor, max_length=64)
    (written,) = write(task, model, [asked], processor, Sampling(max_new_tokens=6), batch_size=1)
    given = task.given([asked], processor)["input_features"]
    with torch.no_grad():
        out = model.generate(given, language="de", task=way, max_new_tokens=6)
    assert written.text == processor.tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("languages", "several", "message"),
    [
        ("de", False, "several languages alone; leave it out"),
        ("dee", True, "expected a language of Whisper.*Did you mean.*de"),
        ("de-fr", True, "or de-en to translate it into English"),
    ],
)
def test_languages_that_mean_nothing_are_refused(languages: str, several: bool, message: str) -> None:
    config = speech.config(speech.MANY) if several else speech.config()
    with pytest.raises(ConfigError, match=message):
        fitted(clips(1), config, languages=languages)
    with pytest.raises(ConfigError, match="prefix has no meaning for task speech_seq2seq"):
        fitted(clips(1), prefix="a")
    with pytest.raises(ConfigError, match="A llama writes no text from an encoder's sound"):
        fitted(clips(1), transformers.LlamaConfig())


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_transformers(batch_size: int, ends: bool) -> None:
    model, processor, rows = speech.model().eval(), speech.processor(), clips()
    if ends:
        # The end is what the model would write third.
        samples = processor.feature_extractor(speech.tone("low")[:, 0], sampling_rate=16_000, return_tensors="pt")
        third = model.generate(samples.input_features, max_new_tokens=3)[0, 2]
        model.proj_out.weight.data[speech.END] = model.proj_out.weight.data[third] * 1.05
    task = fitted(rows)
    asked = task.ask(rows, processor, max_length=64)
    found = write(task, model, asked, processor, Sampling(max_new_tokens=5), batch_size=batch_size)
    for one, row in zip(found, rows, strict=True):
        samples, rate = soundfile.read(io.BytesIO(row.values["audio"]["bytes"]), dtype="float32")
        given = processor.feature_extractor(samples, sampling_rate=rate, return_tensors="pt").input_features
        with torch.no_grad():
            whole = model.generate(
                given, max_new_tokens=5, return_dict_in_generate=True, force_unique_generate_call=True
            ).sequences[0]
        text = whole[2:].tolist()
        assert one.text == processor.tokenizer.decode(text, skip_special_tokens=True)
        assert one.tokens == len(text)
        assert one.stopped == (text[-1] == speech.END)
    assert any(one.stopped for one in found) == ends
    judged = task.judge([one.text for one in found], [[row.values["text"]] for row in rows])
    assert set(judged) == {"wer", "cer"} == set(task.answer_goals)
    assert task.judge(["low"], [["high low"]])["wer"] == jiwer.wer("high low", "low") == 0.5
    assert set(fitted(rows, judge_by="exact_match").answer_goals) == {"exact_match"}


@pytest.mark.parametrize("truncate", ["end", "start", "drop", "fail"])
def test_what_is_too_long_is_cut_dropped_or_named(truncate: Any) -> None:
    long = {"bytes": speech.encoded("low", seconds=1.5)}
    short = {"bytes": speech.encoded("low")}
    rows = rows_of([{"audio": short, "text": "a" * 60}, {"audio": short, "text": "b"}, {"audio": long, "text": "c"}])
    processor = speech.processor()
    how = {"max_length": 64, "train_on": "all", "truncate": truncate}
    task = fitted(rows)
    if truncate == "fail":
        with pytest.raises(DataError, match="example 1 has 62 tokens to write, and at most 48 are taken; cut it"):
            task.encode(rows, processor, **how)
        with pytest.raises(DataError, match=r"example 3 is 1\.5 s long, and at most 1 s are taken; cut it"):
            task.encode(rows[1:], processor, **how)
        with pytest.raises(DataError, match=r"example 3 is 1\.5 s long.*shorter clips"):
            task.ask(rows, processor, max_length=64)
        return
    found = task.encode(rows, processor, **how)
    assert (found.report.truncated, found.report.dropped) == ((0, 2) if truncate == "drop" else (2, 0))
    assert found.report.tokens == found.report.trained_tokens == sum(len(one.labels) for one in found.examples)
    if truncate != "drop":
        assert [len(one.labels) for one in found.examples] == [48, 3, 3]
        assert found.examples[0].labels[-1] == speech.END
        assert found.report.tokens_cut == 14
        assert found.examples[2].more["cut"] == truncate


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"audio": {"bytes": b"x"}, "text": "a"}, "example 1 has no whole sound"),
        ({"audio": "gone.wav", "text": "a"}, "example 1 has audio = 'gone.wav': no file"),
        ({"text": "a"}, "example 1 has no audio; its columns are text"),
        ({"audio": {"bytes": speech.encoded("low")}, "text": " "}, "example 1 has an empty text"),
        ({"audio": {"bytes": speech.encoded("low")}, "text": 3}, "example 1 has text = 3; expected text"),
        ({"audio": {"bytes": speech.encoded("low")}, "txt": "a"}, "example 1 has no text; its columns.*Did you mean"),
    ],
)
def test_a_row_that_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    rows = rows_of([values])
    with pytest.raises(DataError, match=message):
        fitted(rows).encode(rows, speech.processor(), max_length=64, train_on="all")


METHODS = [{"method": "full"}, {"method": "head"}, {"r": 4}, {"use_dora": True}]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_learns_and_comes_back(
    method: dict[str, Any], whisper: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(
        RunConfig(
            model=str(whisper),
            data=str(data),
            output=str(tmp_path / "run"),
            task="speech_seq2seq",
            eval_data=str(data),
            max_steps=15,
            eval_every=15,
            batch_size=4,
            learning_rate=0.02,
            **method,
        )
    )
    before, after = result.record.held_out_before, result.record.held_out_after
    assert before is not None
    assert after is not None
    assert after["loss"] < before["loss"]
    adapted = method.get("method") is None
    given = ["--adapter", str(tmp_path / "run")] if adapted else ["--model", str(tmp_path / "run" / "best")]
    assert main(["predict", *given, "--data", str(data / "0.wav"), "--max-new-tokens", "6", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["predictions"]
    assert said["origin"] == "0.wav"
    assert isinstance(said["text"], str)
    if adapted:
        loaded = AutoPeftModel.from_pretrained(tmp_path / "run" / "best")
        assert isinstance(loaded.get_base_model(), transformers.WhisperForConditionalGeneration)


@pytest.mark.filterwarnings("default:This merge cannot go tensor by tensor")
def test_merged_it_writes_the_same(whisper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = speech.folder(tmp_path / "clips", rate=8_000, channels=2)
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    flags = ["--task", "speech_seq2seq", "--max-steps", "4", "--eval-every", "2", "--learning-rate", "0.02"]
    flags += ["--eval-data", str(data), "--samples", "2", "--sample-tokens", "5", "--columns", "text=transcription"]
    assert main(["train", "--model", str(whisper), "--data", str(data), "--output", run, *flags]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("8 of 8 clips are resampled to 16,000 Hz") == 1
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"wer", "cer"} <= record["held_out_after"].keys()
    assert main(["merge", "--model", str(whisper), "--adapter", run, "--output", merged]) == 0
    found = []
    for given in (["--adapter", run], ["--model", merged]):
        capsys.readouterr()
        assert main(["predict", *given, "--data", str(data), "--max-new-tokens", "6", "--json"]) == 0
        found.append([one["text"] for one in json.loads(capsys.readouterr().out)["predictions"]])
        assert main(["eval", *given, "--data", str(data), "--answers", "3", "--max-new-tokens", "6", "--json"]) == 0
        assert "wer" in capsys.readouterr().out
    assert found[0] == found[1]
    assert len(found[0]) == 8


def test_bad_clips_are_named_or_left_out(
    whisper: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "3.flac").write_bytes((data / "3.flac").read_bytes()[:500])
    flags = ["--model", str(whisper), "--data", str(data), "--task", "speech_seq2seq", "--max-steps", "1"]
    assert main(["train", *flags, "--output", str(tmp_path / "a")]) == 1
    assert "metadata.csv:5 has no whole sound" in " ".join(capsys.readouterr().err.split())
    assert main(["train", *flags, "--output", str(tmp_path / "b"), "--on-bad-row", "skip"]) == 0
    assert "1 bad rows are left out" in " ".join(capsys.readouterr().out.split())


def test_in_memory_rows_of_a_data_set(data: Path) -> None:
    direct = read_rows(data)
    examples = fitted(direct).encode(direct, speech.processor(), max_length=64, train_on="all")
    other = rows_of(
        {"audio": {"bytes": (data / row.values["file_name"]).read_bytes()}, "text": row.values["transcription"]}
        for row in direct
    )
    assert fitted(other).encode(other, speech.processor(), max_length=64, train_on="all").fingerprint == (
        examples.fingerprint
    )
