"""The gate between running generations and changes of the weights.

Owns who may touch the model when: one step (a prefill, one decoded token, one measured batch) or one change at a time,
a waiting change before waiting steps. In `drain` mode a change also waits until the generations that have begun are
over, and new ones wait for the change. Knows nothing of what a step or a change is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

GateMode = Literal["refresh", "drain"]


class Gate:
    """One door for steps and changes. Every method may be called from any thread."""

    def __init__(self, mode: GateMode = "refresh") -> None:
        """`refresh`: changes come between steps. `drain`: changes come between generations."""
        self.mode: GateMode = mode
        self._door = threading.Condition()
        self._holder: int | None = None  # the thread inside
        self._depth = 0
        self._changes_waiting = 0
        self._generations = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold the model for one step. A thread that is inside already may enter again."""
        with self._inside(change=False):
            yield

    @contextmanager
    def change(self) -> Iterator[None]:
        """Hold the model for a change of its weights."""
        with self._door:
            self._changes_waiting += 1
        try:
            with self._inside(change=True):
                yield
        finally:
            with self._door:
                self._changes_waiting -= 1
                self._door.notify_all()

    def begin_generation(self) -> None:
        """Say that a generation starts; waits, in drain mode, for changes that wait already."""
        me = threading.get_ident()
        with self._door:
            while self.mode == "drain" and self._changes_waiting and self._holder != me:
                self._door.wait()
            self._generations += 1

    def end_generation(self) -> None:
        """Say that a generation is over."""
        with self._door:
            self._generations -= 1
            self._door.notify_all()

    @contextmanager
    def _inside(self, *, change: bool) -> Iterator[None]:
        me = threading.get_ident()
        with self._door:
            if self._holder != me:
                while self._holder is not None or self._must_wait(change):
                    self._door.wait()
                self._holder = me
            self._depth += 1
        try:
            yield
        finally:
            with self._door:
                self._depth -= 1
                if self._depth == 0:
                    self._holder = None
                    self._door.notify_all()

    def _must_wait(self, change: bool) -> bool:
        if self.mode == "drain":
            # Steps of generations that have begun go on; the change comes when the last of them is over.
            return change and self._generations > 0
        return not change and self._changes_waiting > 0
