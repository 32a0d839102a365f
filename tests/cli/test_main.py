"""The program around the verbs: its surface, exit codes, JSON, errors in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from veneer.cli import main as program
from veneer.cli.main import VERBS, app, main
from veneer.core.errors import TrainingError, UsageError
from veneer.train.families import adapter_fields

ADAPTER_FLAGS = {f"--{name.replace('_', '-')}" for name in adapter_fields()}
RUN_FIELDS = (
    *(
        "model",
        "data",
        "eval_data",
        "eval_fraction",
        "columns",
        "on_bad_row",
        "workers",
        "cache",
        "truncate",
        "output",
        "task",
        "labels",
        "problem",
        "class_weights",
        "prefix",
        "stride",
        "languages",
        "judge_by",
        "database",
        "pooling",
        "code",
        "method",
        "epochs",
        "max_steps",
    ),
    *(
        "batch_size",
        "accumulation",
        "packing",
        "kernels",
        "matmul",
        "max_tokens",
        "learning_rate",
        "head_learning_rate",
        "schedule",
        "warmup",
        "loraplus_lr_ratio",
    ),
    *("optimizer", "weight_decay", "clip"),
    *(
        "checkpoint",
        "memory_limit",
        "offload_activations",
        "strategy",
        "quantize",
        "precision",
        "max_length",
        "train_on",
        "seed",
        "log_every",
        "eval_every",
        "samples",
        "sample_tokens",
        "best_metric",
        "min_delta",
        "patience",
        "save_every",
        "keep",
        "keep_every",
        "explosion",
        "track",
    ),
)
RUN_FLAGS = {f"--{name.replace('_', '-')}" for name in RUN_FIELDS} | {"--config", "--resume"}
SURFACE = {
    "demo": {"--output", "--model", "--examples", "--seed", "--force"},
    "train": RUN_FLAGS | ADAPTER_FLAGS,
    "runs": {"--compare", "--plot", "--force"},
    "data": {
        *("--model", "--preview", "--task", "--max-length", "--truncate", "--train-on", "--columns", "--batch-size"),
        *("--workers", "--cache", "--labels", "--problem", "--prefix", "--languages", "--stride", "--code"),
    },
    "generate": {
        "--model",
        "--adapter",
        "--prompt",
        "--system",
        "--max-new-tokens",
        "--temperature",
        "--top-p",
        "--seed",
        "--dtype",
        "--quantize",
    },
    "chat": {
        *("--model", "--adapter", "--system", "--max-new-tokens", "--temperature", "--top-p", "--seed"),
        *("--dtype", "--quantize"),
    },
    "eval": {
        *("--data", "--model", "--adapter", "--dtype", "--quantize"),
        *("--task", "--max-length", "--train-on", "--columns", "--batch-size", "--on-bad-row", "--workers", "--cache"),
        *("--answers", "--max-new-tokens", "--plot", "--code", "--database", "--matmul"),
    },
    "predict": {
        *("--data", "--model", "--adapter", "--dtype", "--quantize", "--output", "--force", "--code"),
        *("--task", "--max-length", "--columns", "--batch-size", "--matmul"),
        *("--max-new-tokens", "--temperature", "--top-p", "--seed"),
    },
    "merge": {"--model", "--adapter", "--output", "--dtype", "--verify", "--into", "--force"},
    "extract": {
        *("--base", "--tuned", "--r", "--energy", "--output", "--force"),
        *("--target-modules", "--exclude-modules", "--modules-to-save"),
    },
    "resize": {"--r", "--energy", "--output", "--force"},
    "convert": {"--model", "--to", "--r", "--energy", "--output", "--force"},
    "export": {"--check", "--to", "--model", "--output", "--max-lora-rank", "--force"},
    "inspect": {"--task", "--against", "--model", "--plot", "--force"} | ADAPTER_FLAGS,
    "env": set(),
}


def test_the_surface_is_frozen() -> None:
    command = typer.main.get_command(app)
    found = {
        name: {option for parameter in verb.params for option in parameter.opts if option.startswith("--")}
        for name, verb in command.commands.items()
    }
    assert found == {verb: flags | {"--json"} for verb, flags in SURFACE.items()}


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, flag: str) -> None:
    result = CliRunner().invoke(app, [verb, flag])
    assert result.exit_code == 0
    assert f"Example: veneer {verb}" in " ".join(result.output.split())
    assert "--json" in result.output


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("veneer 0.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["inpsect"], "Did you mean 'inspect'? See veneer -h."),
        (["inspect", "x", "--lora-alhpa", "1"], "Did you mean '--lora-alpha'? See veneer inspect -h."),
        (["inspect"], "Missing argument 'MODEL'. See veneer inspect -h."),
        (["generate", "--prompt", "x"], "Missing option '--model'"),
        (["generate", "--model", "x", "--prompt", "y", "--seed", "z"], "Invalid value for '--seed'"),
        (["inspect", "/no/such/model"], "There is no folder '/no/such/model'"),
    ],
)
def test_a_mistake_is_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
    assert len(err.splitlines()) == 1


def test_an_error_is_a_json_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "/no/such/model", "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (error["type"], error["exit_code"]) == ("UsageError", 2)
    assert err.strip() == f"error: {error['message']}"


def _instead_of_a_verb(monkeypatch: pytest.MonkeyPatch, function: Callable[[], object]) -> None:
    other = typer.Typer()
    other.command()(lambda: function())
    monkeypatch.setattr(program, "app", other)


def _raising(error: BaseException) -> Callable[[], object]:
    def function() -> object:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UsageError("No [such] thing."), 2, "error: No [such] thing."),
        (TrainingError("The loss is nan."), 1, "error: The loss is nan."),
        (KeyboardInterrupt(), 130, "error: Interrupted."),
        (ZeroDivisionError("by\nzero"), 1, "error: Unexpected error, ZeroDivisionError: by (set VENEER_DEBUG=1"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    expected: str,
) -> None:
    _instead_of_a_verb(monkeypatch, _raising(error))
    assert main([]) == code
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert "Traceback" not in err


def test_the_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VENEER_DEBUG", "1")
    _instead_of_a_verb(monkeypatch, _raising(ZeroDivisionError("by zero")))
    assert main([]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_run_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _instead_of_a_verb(monkeypatch, _raising(typer.Exit(130)))
    assert main([]) == 130
    assert capsys.readouterr().err == "error: Interrupted.\n"


def test_what_a_library_prints_stays_out_of_the_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    def talkative() -> dict[str, float]:
        print("a library talks")
        warnings.warn("look out", stacklevel=1)
        return {"loss": float("nan")}

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(program, "_run", lambda arguments, document: _emit(document, talkative()))
        assert main(["--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": None}
    assert "a library talks" in err
    assert "warning: look out" in err


def _emit(document: object, value: object) -> int:
    program.write_document(document, value)  # type: ignore[arg-type]
    return 0


def _veneer(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    code = "from veneer.cli.main import run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=60, **settings
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from veneer.cli.main import main; main(['-h']); "
        "print([name for name in ('torch', 'transformers', 'accelerate', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_exit_codes_of_the_program() -> None:
    assert _veneer("--version").returncode == 0
    wrong = _veneer("mrege", "--json")
    assert (wrong.returncode, json.loads(wrong.stdout)["error"]["exit_code"]) == (2, 2)
    assert "Traceback" not in wrong.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end differently")
def test_a_broken_pipe_is_quiet(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from veneer.cli.main import run; run()"
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-c", code, "-h"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.stderr == ""
