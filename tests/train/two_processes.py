"""One process of a run that several do together, or alone; run by test_processes.py.

python two_processes.py JSON   (with RANK, WORLD_SIZE and the rest in the environment, as torchrun sets them)

The JSON is a list of runs, one after the other: settings of a run each, with its output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch

from tests import chat
from veneer.core.errors import VeneerError
from veneer.train.config import RunConfig
from veneer.train.learner import Learner
from veneer.train.loop import train
from veneer.train.resume import resumed


def main(text: str) -> int:
    """Train; what the exit code says is what the command line would for the last run."""
    torch.set_num_threads(1)
    for settings in json.loads(text):
        torch.manual_seed(0)
        code = one(settings)
    return code


def one(settings: dict[str, Any]) -> int:
    """One run."""
    resume, stop_at = settings.pop("resume", False), settings.pop("stop_at", None)
    break_at, tied = settings.pop("break_at", None), settings.pop("tied", False)
    is_last = int(os.environ.get("RANK", "0")) == int(os.environ["WORLD_SIZE"]) - 1
    take = Learner.take

    def taking(self: Learner, group: Any, step: int, *args: Any) -> Any:
        # The last process alone is told to end.
        if step == stop_at and is_last:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == break_at and is_last:
            self.bare.get_input_embeddings().weight.data.fill_(float("nan"))  # type: ignore[operator]
        return take(self, group, step, *args)

    Learner.take = taking  # type: ignore[method-assign]
    config = resumed(settings.pop("output"), **settings) if resume else RunConfig(**settings)
    try:
        result = train(
            config, model=chat.model(tied=tied), tokenizer=chat.tokenizer(), train_rows=chat.pairs(22), resume=resume
        )
    except VeneerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        Learner.take = take  # type: ignore[method-assign]
    return 128 + signal.SIGTERM if result.record.interrupted else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
