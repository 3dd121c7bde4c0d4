"""Ctrl-C and SIGTERM, held back until it is safe to act on them."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class DeferredSignals:
    """Within this context the first SIGINT or SIGTERM is only noted; a second one acts at once.

    Outside the main thread, where Python delivers no signals, the context does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not None:  # None: not ours to restore
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if self.received is not None and error is None:
            signal.raise_signal(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def deliver(self, number: int) -> None:
        """Let a signal, held back here or in another process, take its effect: ``KeyboardInterrupt``, or the end."""
        self.received = None
        self._restore()
        signal.raise_signal(number)
        self.__enter__()  # a handler that let training go on
