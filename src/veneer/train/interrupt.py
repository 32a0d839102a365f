"""Ctrl-C and SIGTERM as requests: the step in hand is finished, what was learned is saved, then the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self, final

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class Interrupt:
    """While entered, the first signal is kept in ``signal``; the second interrupts at once, as Ctrl-C does.

    Outside the main thread, where Python delivers no signals, it does nothing. ``on_ask`` is called at the first.
    """

    def __init__(self, on_ask: Callable[[], object]) -> None:
        self.on_ask = on_ask
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self.signal is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # A job that was started to ignore Ctrl-C, as shells do in the background, goes on ignoring it.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.signal = number
        self.on_ask()
