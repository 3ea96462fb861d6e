"""Ctrl-C waits while something must not be cut in half.

Owns the block inside which an interrupt is only remembered, and raised when the block is over. Knows nothing of what
the block does. Signals reach the main thread alone, so in every other thread the block changes nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_inside = False  # whether the main thread is in such a block


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Run the block to its end; a Ctrl-C that came meanwhile is raised after it as KeyboardInterrupt.

    Of blocks inside one another, after the outermost.
    """
    global _inside
    if _inside or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = signal.signal(signal.SIGINT, remember)
    _inside = True
    try:
        yield
    finally:
        _inside = False
        # A handler that was not set from Python reads as None and cannot be put back by name.
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
        if came:  # also where the block failed: an interrupt must not get lost behind an error that callers handle
            raise KeyboardInterrupt
