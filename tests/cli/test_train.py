from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import chat
from veneer.cli.main import main
from veneer.cli.run_fields import run_fields
from veneer.core.errors import UsageError
from veneer.tasks import task as tasks
from veneer.train.config import RunConfig
from veneer.train.families import adapter_fields
from veneer.train.sets import asked_for


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data, which the command runs in."""
    chat.saved(tmp_path / "model")
    chat.written(tmp_path / "train.jsonl", chat.pairs(12))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments: str) -> int:
    data = [] if "--data" in arguments else ["--data", "train.jsonl"]
    return main(["train", "--model", "model", *data, "--output", "run", "--batch-size", "4", *arguments])


def test_from_flags_to_a_run_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train(
        "--r", "2", "--target-modules", "q_proj,v_proj", "--learning-rate", "5e-3", "--epochs", "2", "--clip", "none"
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    assert {path.name for path in (place / "run").iterdir()} == {
        "run.yaml", "log.jsonl", "loss.png", "result.json", "README.md", "best", "last", "checkpoints"
    }  # fmt: skip
    assert "⟦the red is red<|end|>⟧" in out
    assert "0 truncated" in out
    assert "trainable parameters" in out
    assert "veneer generate --model model --adapter run/best" in out
    assert "held out" in err
    config = RunConfig.read(place / "run/run.yaml")
    assert (config.r, config.target_modules, config.clip, config.epochs) == (2, ["q_proj", "v_proj"], None, 2)
    assert json.loads((place / "run/best/adapter_config.json").read_text())["r"] == 2


def test_json_is_one_document(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--max-steps", "1", "--json") == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["steps"] == 1
    assert record["held_out_before"]["loss"] > 0
    assert "trainable parameters" in err


def test_flags_override_the_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run.yaml").write_text("model: model\ndata: train.jsonl\nr: 2\nmax_steps: 3\nlora_alpha: 4\n")
    assert main(["train", "--config", "run.yaml", "--output", "run", "--max-steps", "1"]) == 0
    config = RunConfig.read(place / "run/run.yaml")
    assert (config.r, config.max_steps, config.lora_alpha) == (2, 1, 4)
    capsys.readouterr()
    assert main(["train", "--config", "run/run.yaml", "--output", "again"]) == 0
    assert RunConfig.read(place / "again/run.yaml") == RunConfig(**{**config.model_dump(), "output": "again"})


@pytest.mark.parametrize("method", ["full", "head"])
def test_other_methods(place: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    assert train("--method", method, "--max-steps", "1") == 0
    assert "veneer generate --model run/best" in capsys.readouterr().out
    assert (place / "run/best/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "nowhere.jsonl"], 2, "There is no file or folder 'nowhere.jsonl'."),
        (["--data", "broken.jsonl"], 1, "broken.jsonl:1 is not a line of JSON"),
        (["--data", "latin.jsonl"], 1, "latin.jsonl:1 is not UTF-8"),
        (["--data", "empty.jsonl"], 1, "empty.jsonl holds no rows"),
        (["--data", "columns.jsonl"], 1, "columns.jsonl:1 has the columns promt; expected messages"),
        (["--data", "masked.jsonl"], 1, "all is masked"),
        (["--model", "nowhere/at/all"], 2, "nowhere/at/all"),
        (["--model", "bare"], 2, "bare"),
        (["--output", "full"], 2, "The output folder 'full' exists and is not empty"),
        (["--r", "0"], 2, "r is 0"),
        (["--target-modules", "q_porj"], 2, "q_proj"),
        (["--epochs", "many"], 2, "epochs is 'many'"),
        (["--schedule", "cosin"], 2, "schedule is 'cosin'"),
        (["--method", "head", "--r", "4"], 2, "r has no meaning with method=head"),
        (["--config", "typo.yaml"], 2, "no field 'lora_alhpa'. Did you mean 'lora_alpha'"),
        (["--config", "nowhere.yaml"], 2, "There is no config file 'nowhere.yaml'."),
        (["--lerning-rate", "1"], 2, "--learning-rate"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    for name, content in {
        "broken.jsonl": b"{",
        "latin.jsonl": b'{"text": "\xe9"}',
        "empty.jsonl": b"",
        "columns.jsonl": b'{"promt": "a"}',
        "masked.jsonl": b'{"messages": [{"role": "user", "content": "u"}]}',
        "typo.yaml": b"lora_alhpa: 4\n",
    }.items():
        (place / name).write_bytes(content)
    (place / "bare").mkdir()
    (place / "full").mkdir()
    (place / "full/thesis.txt").write_text("x")
    before = sorted(place.rglob("*"))
    assert train(*arguments) == code
    out, err = capsys.readouterr()
    assert message in " ".join(err.split())
    assert out == ""
    assert "Traceback" not in err
    assert sorted(place.rglob("*")) == before


def test_ctrl_c_saves_and_exits_130(place: Path) -> None:
    command = [sys.executable, "-c", "from veneer.cli.main import run; run()", "train", "--model", "model"]
    command += ["--data", "train.jsonl", "--output", "run", "--max-steps", "100000", "--eval-fraction", "0"]
    with subprocess.Popen(
        command, cwd=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ
    ) as process:
        log = place / "run/log.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (log.exists() and '"step"' in log.read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert json.loads((place / "run/result.json").read_text())["interrupted"] is True
    assert (place / "run/last/adapter_model.safetensors").is_file()
    assert (place / "run/loss.png").is_file()


def test_help_has_an_example_and_every_field(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["train", "-h"]) == 0
    text = capsys.readouterr().out
    assert "veneer train --model ./model --data train.jsonl" in text
    for name in (*run_fields(), *adapter_fields()):
        assert f"--{name.replace('_', '-')} " in text


def test_several_files_of_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat.written(place / "more.jsonl", chat.pairs(4))
    assert (
        train("--data", "train.jsonl", "--data", "more.jsonl", "--max-steps", "1", "--eval-fraction", "0", "--json")
        == 0
    )
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == 16
    assert RunConfig.read(place / "run/run.yaml").data == ["train.jsonl", "more.jsonl"]
    assert "train.jsonl, more.jsonl, 16 examples" in (place / "run/last/README.md").read_text()


def test_data_from_stdin(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = io.BytesIO((place / "train.jsonl").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given))
    command = ["train", "--model", "model", "--data", "-", "--output", "run", "--max-steps", "1"]
    assert main([*command, "--eval-data", "-"]) == 2
    assert "data - (stdin) is given twice" in capsys.readouterr().err
    assert main([*command, "--eval-data", "train.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == 12


def test_held_out_data_of_a_folder_that_has_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "folder").mkdir()
    for name, count in (("train", 8), ("valid", 3), ("test", 2)):
        chat.written(place / "folder" / f"{name}.jsonl", chat.pairs(count))
    assert train("--eval-data", "folder", "--max-steps", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["held_out_data"]["rows"] == 3


def test_a_mixture_from_flags(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat.written(place / "more.jsonl", chat.pairs(4))
    assert train("--data", "train.jsonl=1", "--data", "more.jsonl=0") == 2
    assert "The weight of data 'more.jsonl' is 0.0; expected a positive number." in capsys.readouterr().err
    assert train("--data", "train.jsonl=1", "--data", "more.jsonl") == 2
    assert "data 'more.jsonl' has no weight" in capsys.readouterr().err
    mixture = ["--data", "train.jsonl=1", "--data", "more.jsonl=3", "--eval-fraction", "0"]
    assert train(*mixture, "--max-steps", "1", "--workers", "1", "--cache", "kept", "--json") == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert [(part["name"], part["taken"]) for part in parts] == [("train.jsonl", 4), ("more.jsonl", 12)]
    assert len([path for path in (place / "kept").iterdir() if path.is_dir()]) == 2
    assert main(["data", *mixture[1:4:2], "--model", "model", "--cache", "kept", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["from_cache"], [part["taken"] for part in found["parts"]]) == ([True, True], [4, 12])
    assert "12 of more.jsonl (3.00 times its 4)" in found["notes"][-1]


def test_stdin_reaches_one_process_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    monkeypatch.setattr(accelerate, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(UsageError, match=r"data - \(stdin\) reaches one process alone"):
        asked_for(RunConfig(data="-", output="run"), tasks.get("causal_lm"), None, None)
