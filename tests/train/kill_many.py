"""Kill a run at random moments, resume it, and compare what it learned with a run that was never killed.

    python tests/train/kill_many.py 50

Moments are counted in what a run does: steps, and every flush and rename of a file, so that many fall into a save.
Each run is a fork that sends itself SIGKILL at a moment drawn by the seed; a resumed one may be killed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file

from tests import chat
from veneer.train.config import RunConfig
from veneer.train.learner import Learner
from veneer.train.loop import train
from veneer.train.resume import CONFIG_NAME, resumed

STEPS = 9
SETTINGS: dict[str, Any] = {
    "batch_size": 3,
    "accumulation": 2,
    "max_tokens": 60,
    "max_steps": STEPS,
    "eval_every": 2,
    "save_every": 1,
    "learning_rate": 1e-2,
    "lora_dropout": 0.1,
    "target_modules": "all-linear",
    "precision": "fp32",
}


def counting(reach: Callable[[], None]) -> None:
    """Call ``reach`` before every step, flush and rename."""

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reach()
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, counted(getattr(os, name)))
    Learner.take = counted(Learner.take)  # type: ignore[method-assign]


def run(folder: Path, kill_at: int, counter: Path) -> None:
    """Begin or resume the run, in a process that ends at the given moment; 0 lets it live."""
    moments = 0

    def reach() -> None:
        nonlocal moments
        moments += 1
        if moments == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    counting(reach)
    torch.set_num_threads(1)
    given = {"model": chat.model(), "tokenizer": chat.tokenizer(), "train_rows": chat.pairs(24)}
    if (folder / CONFIG_NAME).is_file():
        train(resumed(folder), resume=True, **given)
    else:
        train(RunConfig(output=str(folder), **SETTINGS), **given)
    counter.write_text(str(moments))


def forked(work: Callable[[], None]) -> int:
    """Do it in a process of its own; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def steps_logged(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line about a step."""
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(event["step"], event["loss"]) for event in events if event["event"] == "step"]


def learned(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the last and the best adapter."""
    return {
        f"{name}/{key}": tensor
        for name in ("last", "best")
        for key, tensor in load_file(folder / name / "adapter_model.safetensors").items()
    }


def main(kills: int, seed: int = 0) -> None:
    """Kill so many runs; an error says which one did not come back."""
    drawn = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        whole, counter = place / "whole", place / "moments"
        assert forked(lambda: run(whole, 0, counter)) == 0
        moments, expected, losses = int(counter.read_text()), learned(whole), steps_logged(whole)
        assert [step for step, _ in losses] == list(range(1, STEPS + 1))
        killed = 0
        while killed < kills:
            folder = place / f"run-{killed}"
            at = drawn.randint(1, moments)
            while forked(lambda folder=folder, at=at: run(folder, at, counter)) == -signal.SIGKILL:  # type: ignore[misc]
                killed += 1
                # Some are killed again on their way back.
                at = drawn.randint(1, moments) if drawn.random() < 0.3 else 0
            found = learned(folder)
            assert found.keys() == expected.keys(), folder
            different = [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])]
            assert not different, f"killed at moment {at}: {different[:3]} differ"
            assert steps_logged(folder) == losses, "the log has other steps"
            left = [path.name for path in (*folder.glob(".*"), *(folder / "checkpoints").glob(".*"))]
            assert not left, left
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
        print(f"{killed} kills at {moments} moments: every run came back to the same weights, bit for bit")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
