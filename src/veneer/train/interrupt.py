"""Ctrl-C as a request: the step in hand is finished, what was learned is saved, then the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self, final


@final
class Interrupt:
    """While entered, the first Ctrl-C sets ``asked``; the second interrupts at once, as usual.

    Outside the main thread, where Python delivers no signals, it does nothing. ``on_ask`` is called at the first.
    """

    def __init__(self, on_ask: Callable[[], object]) -> None:
        self.on_ask = on_ask
        self.asked = False
        self.before: Any = None

    def __enter__(self) -> Self:
        ours = threading.current_thread() is threading.main_thread()
        # A job that was started to ignore Ctrl-C, as shells do in the background, goes on ignoring it.
        if ours and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.on_ask()
