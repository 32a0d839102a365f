"""Going on with a run that was stopped: what it was, whether this is still the same, and where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from veneer.adapters.fingerprint import fingerprint
from veneer.adapters.model import PeftModel
from veneer.core.errors import ConfigError, UsageError, listed
from veneer.train.config import RunConfig
from veneer.train.log import LOG_NAME
from veneer.train.prepare import Plan
from veneer.train.processes import with_processes
from veneer.train.state import FOLDER, Saved, newest

CONFIG_NAME = "run.yaml"
RESULT_NAME = "result.json"

FREE = frozenset(
    {
        *("model", "data", "eval_data", "output", "log_every", "eval_every", "save_every", "keep", "keep_every"),
        *("samples", "sample_tokens"),
        *(
            "batch_size",
            "accumulation",
            "patience",
            "explosion",
            "track",
            "checkpoint",
            "memory_limit",
            "offload_activations",
            "workers",
            "cache",
            "strategy",
        ),
    }
)
"""Fields that may change on the way: paths, whose content is compared, how a step is shared out, whose examples are
counted, and what has no part in the weights."""


def resumed(folder: str | Path, **overrides: Any) -> RunConfig:
    """The config of a run to go on with.

    >>> train(resumed("runs/first"), resume=True)

    Args:
        folder: the run folder; it may have been moved.
        overrides: fields to change, of those that may change.

    Raises:
        UsageError: it is no run folder, or the run is finished.
    """
    place = Path(folder).expanduser()
    if not (place / CONFIG_NAME).is_file():
        raise UsageError(f"{str(folder)!r} has no {CONFIG_NAME}; expected the folder of a run that was stopped.")
    return RunConfig.read(place / CONFIG_NAME, **{**overrides, "output": str(folder)})


def picked_up(config: RunConfig, processes: int) -> tuple[Saved | None, RunConfig, list[str]]:
    """The checkpoint to go on from, the config for as many processes as there are, and what there is to say.

    Leftovers of a process that was killed while it wrote are put in order first.

    Raises:
        UsageError: nothing was begun here, or all steps are done.
        ConfigError: so many processes cannot share its steps.
    """
    from accelerate import PartialState

    folder = Path(config.output).expanduser()
    if not (folder / CONFIG_NAME).is_file():
        raise UsageError(f"There is nothing to resume in {str(folder)!r}; leave resume out to begin a run there.")
    if (folder / RESULT_NAME).is_file():
        result = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
        if not result["interrupted"]:
            raise UsageError(f"The run in {str(folder)!r} is finished, after {result['steps']:,} steps.")
    if PartialState().is_main_process:
        tidy(folder)
    PartialState().wait_for_everyone()
    saved, said = newest(folder)
    if saved is None:
        return None, config, [*said, "No checkpoint was written yet, so the run begins anew."]
    config, shared = with_processes(config, saved, processes)
    return saved, config, [*said, f"The run goes on after step {saved.step:,}.", *shared]


def agreement(plan: Plan) -> dict[str, Any]:
    """What a run and its resumption must have in common."""
    model = plan.trained.model
    held_out, mixed = plan.held_out, plan.batching.mixture
    return {
        "the training data": plan.train_set.fingerprint,
        "the held-out data": held_out.fingerprint if held_out else None,
        "the mixture": mixed.to_dict() if mixed else None,
        "the model": fingerprint(model.base_model) if isinstance(model, PeftModel) else None,
        "the number of steps": plan.steps,
        "examples a step": plan.batching.per_step,
        "packing": plan.batching.packed or plan.config.batch_size,
        "config": {name: value for name, value in plan.config.to_dict().items() if name not in FREE},
    }


def check(saved: Saved, plan: Plan) -> None:
    """Whether a prepared run is the one that a checkpoint is of.

    Raises:
        ConfigError: it is not; the message names what differs.
    """
    was, now = dict(saved.values["about"]), agreement(plan)
    then, here = was.pop("config"), now.pop("config")
    fields = sorted(name for name in then.keys() | here.keys() if then.get(name) != here.get(name))
    differ = [f"{name} was {then.get(name)!r} and is {here.get(name)!r}" for name in fields]
    # One cause has many effects: another batch size changes the number of steps too.
    differ = differ or [f"{name} is not what it was" for name in now if was.get(name) != now[name]]
    if differ:
        raise ConfigError(
            f"This is not the run that was stopped: {listed(differ)}. Resume it as it was, or begin a new one; "
            f"of a run only {listed(sorted(FREE), most=20)} may change."
        )


def tidy(folder: Path) -> None:
    """Put in order what a process left that was killed while it wrote."""
    for left in [*folder.glob(".*.old"), *(folder / FOLDER).glob(".*.old")]:
        # ".best.1234.old" is what stood at "best" until the new one was about to take its place.
        place = left.with_name(left.name.removeprefix(".").rsplit(".", 2)[0])
        if not place.exists():
            left.rename(place)
    for pattern in (".*.new", ".*.tmp", ".*.old", ".*.gone"):
        for left in [*folder.glob(pattern), *(folder / FOLDER).glob(pattern)]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def rewind(folder: Path, size: int) -> None:
    """Cut the log to what it was when a checkpoint was written: the steps after it come again."""
    path = folder / LOG_NAME
    if path.is_file() and path.stat().st_size > size:
        with path.open("r+b") as stream:
            stream.truncate(size)
