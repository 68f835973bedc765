"""Ctrl-C that waits for the end of a step, so that what is kept is whole."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

PATIENCE = 2.0
"""Seconds after which a second Ctrl-C no longer waits."""


class Interrupts:
    """While it is entered, the first Ctrl-C only sets `asked`; a later second one interrupts.

    In any thread but the main one, which Python's signals go to, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        self._before: Any = None

    def __enter__(self) -> Self:
        """Ctrl-C is held back."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Ctrl-C is as it was."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._since > PATIENCE:
            raise KeyboardInterrupt
        if not self.asked:
            self._since = time.monotonic()
        self.asked = True
