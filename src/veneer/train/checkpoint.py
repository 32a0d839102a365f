"""What a run keeps: an adapter or a whole model with its tokenizer, written beside and then put in place."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from veneer.adapters.model import PeftModel
from veneer.core.errors import DiskError
from veneer.tasks.kept import TASK_NAME

BEST = "best"
LAST = "last"


def save(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    figures: Mapping[str, str],
    task: str,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model into a folder of its own; an older one in its place is replaced only by a whole new one.

    Args:
        model: an adapted model, of which the adapter is written, or a transformers model, which is written whole.
        tokenizer: the tokenizer or processor, saved beside it, chat template included; None where there is none.
        folder: where it will stand, e.g. ``run/best``.
        figures: lines for the adapter's model card.
        task: the text of ``task.json``.
        state_dict: the tensors of a model that is split over processes, put together.

    Raises:
        DiskError: the disk is full or not writable; what stood there before still stands.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        _write(model, tokenizer, beside, figures, state_dict)
        (beside / TASK_NAME).write_text(task, encoding="utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(beside, folder)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        cause = error.__cause__ if isinstance(error, DiskError) and error.__cause__ else error
        reason = getattr(cause, "strerror", None) or cause
        raise DiskError(f"Could not write {folder}: {reason}. What was there before is unchanged.") from error
    finally:
        for left in (beside, old):
            with contextlib.suppress(OSError):
                shutil.rmtree(left, ignore_errors=True)


def _write(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    figures: Mapping[str, str],
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    folder.mkdir(parents=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, tokenizer=tokenizer, figures=figures, state_dict=state_dict)
        return
    with _no_bars():
        model.save_pretrained(folder, state_dict=state_dict)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers would draw a bar of its own through the run's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
