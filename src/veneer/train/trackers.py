"""Where else a run is written to while it goes: TensorBoard, wandb and the others, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from veneer.core.disk import write_text
from veneer.core.errors import TrainingError, UsageError
from veneer.train.config import TRACKERS, RunConfig

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "veneer"
"""The project, or experiment, that runs stand in."""

TENSORBOARD = "tensorboard"
"""The folder of a run that TensorBoard reads."""

IDENTITY_NAME = "wandb-id.txt"
"""The file of a run that has its identity at wandb."""

_OFFLINE = {
    "wandb": ("WANDB_MODE", "offline"),
    "swanlab": ("SWANLAB_MODE", "offline"),
    "clearml": ("CLEARML_OFFLINE_MODE", "1"),
    "comet_ml": ("COMET_START_ONLINE", "false"),
}
"""What tells a tracker to keep to the disk. The others do so by themselves."""

_PREFIXES = {"step": "train", "eval": "eval"}


def check_trackers(config: RunConfig) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        UsageError: it is not installed; the message says how to install it.
    """
    for name in config.trackers():
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"track={name} needs a package that is not here: pip install {TRACKERS[name]}.")


@final
class Trackers:
    """The trackers of a run, from its start to ``finish``; none when the config names none.

    Without a network (``HF_HUB_OFFLINE=1``) they are told to keep to the disk, unless the environment says otherwise.

    Raises:
        TrainingError: one cannot be started, for instance for want of a login.
    """

    def __init__(self, config: RunConfig) -> None:
        self.running: dict[str, GeneralTracker] = {}
        # Those that may refuse come first, so that nothing is left of a run that cannot begin.
        for name in sorted(config.trackers(), key=lambda name: name == TENSORBOARD):
            try:
                self.running[name] = _started(name, config)
            except Exception as error:
                self.finish()
                raise TrainingError(f"The tracker {name} could not be started: {_reason(error)}.") from error

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Pass a step or a measurement on: its numbers, under ``train/`` and ``eval/``.

        A tracker that fails is left out from then on, with a warning: a run does not end for want of a network.
        """
        if event not in _PREFIXES or not self.running:
            return
        numbers = {
            f"{_PREFIXES[event]}/{name}": value
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float)
        }
        for name, tracker in list(self.running.items()):
            try:
                tracker.log(numbers, step=values["step"])
            except Exception as error:
                del self.running[name]
                _left_out(name, error)

    def finish(self) -> None:
        """Let every tracker write what it still holds; also after a failure."""
        for name, tracker in self.running.items():
            try:
                tracker.finish()
            except Exception as error:
                _left_out(name, error)
        self.running = {}


def _started(name: str, config: RunConfig) -> GeneralTracker:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and name in _OFFLINE:
        os.environ.setdefault(*_OFFLINE[name])
    folder = Path(config.output).expanduser()
    made = LOGGER_TYPE_TO_CLASS[name]
    tracker: GeneralTracker
    same = _the_same(folder) if name == "wandb" else {}
    if name == TENSORBOARD:
        tracker = made(TENSORBOARD, folder)
    elif made.requires_logging_directory:
        tracker = made(PROJECT, folder)
    else:
        tracker = made(PROJECT, **_named(name, folder.name), **same)
    tracker.start()
    if same:
        write_text(folder / IDENTITY_NAME, same["id"])
    tracker.store_init_configuration({key: _plain(value) for key, value in config.to_dict().items()})
    return tracker


def _named(tracker: str, run: str) -> dict[str, str]:
    """What gives the run its folder's name, where a tracker takes one."""
    words = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}
    return {words[tracker]: run} if tracker in words else {}


def _the_same(folder: Path) -> dict[str, str]:
    """What lets a run that goes on be one run at wandb, and no second one of that name."""
    kept = folder / IDENTITY_NAME
    known = kept.read_text(encoding="utf-8").strip() if kept.is_file() else uuid.uuid4().hex
    return {"id": known, "resume": "allow"}


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _left_out(name: str, error: Exception) -> None:
    warnings.warn(f"The tracker {name} failed and is left out from here on: {_reason(error)}.", stacklevel=3)
