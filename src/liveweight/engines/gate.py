"""The gate between running generations and changes of the weights.

Owns who may touch the model when: one step (a prefill, one decoded token, one measured batch) or one change at a time,
a waiting change before waiting steps. Steps share the time fairly: the thread that has used the least of it goes
first, so that a search with its long steps takes half of the time from those who chat, and not nearly all of it. In
`drain` mode a change also waits until the generations that have begun are over, but no longer than it was told, and new
ones wait for the change. Knows nothing of what a step or a change is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

GateMode = Literal["refresh", "drain"]
PATIENCE = 30.0  # seconds that a change waits for generations to end
_BACK_SOON = 0.01  # seconds within which a thread that goes from step to step is at the door again
_GONE = 1.0  # seconds after which a thread that was away is as one that is new
_CLAIM = 1.0  # seconds that a thread may at most be behind the others, and so have before them


@dataclass
class _Share:
    """What one thread has used of the time."""

    used: float  # seconds
    left: float  # when it last left
    waits: int = 0  # its place in line, while it waits; 0 while it does not


class _Here(threading.local):
    """What the thread that is here wants to be asked before each of its steps."""

    check: Callable[[], None] | None = None


def _nothing() -> None:
    """Go on."""


class Gate:
    """One door for steps and changes. Every method may be called from any thread."""

    def __init__(self, mode: GateMode = "refresh", patience: float = PATIENCE) -> None:
        """`refresh`: changes come between steps. `drain`: between generations, if these end within `patience` seconds.

        A change whose patience is over comes between two steps, and the generations refresh.
        """
        self.mode: GateMode = mode
        self.patience = patience
        self._door = threading.Condition()
        self._holder: int | None = None  # the thread inside
        self._depth = 0
        self._shares: dict[int, _Share] = {}  # of the threads that took steps lately
        self._places = 0  # in line that were given out
        self._overdue: list[float] = []  # of each waiting change: from when on it waits for no generation
        self._generations = 0
        self._here = _Here()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold the model for one step. A thread that is inside already may enter again."""
        if self._here.check is not None:
            self._here.check()
        me = threading.get_ident()
        with self._door:
            if self._holder != me:
                share = self._share_of(me)
                self._places += 1
                share.waits = self._places
                try:
                    while self._holder is not None or self._change_is_next() or self._other_is_due(share):
                        # Somebody who is due may not be at the door yet, and may not come.
                        self._door.wait(_BACK_SOON if self._holder is None else None)
                finally:
                    share.waits = 0
                    self._door.notify_all()  # the next one in line may look, even where this one gave up
                self._holder = me
            self._depth += 1
            began = time.monotonic()
        try:
            yield
        finally:
            self._leave(began)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Hold the model for a change of its weights."""
        me = threading.get_ident()
        with self._door:
            if self._holder != me:
                overdue = time.monotonic() + self.patience
                self._overdue.append(overdue)
                try:
                    while self._holder is not None or self._waits_for_generations(overdue):
                        left = overdue - time.monotonic()
                        self._door.wait(left if self.mode == "drain" and left > 0 else None)
                finally:
                    self._overdue.remove(overdue)
                    self._door.notify_all()
                self._holder = me
            self._depth += 1
        try:
            yield
        finally:
            self._leave()

    def begin_generation(self, *, wait: bool = True) -> bool:
        """Say that a generation starts, which in drain mode has to wait for changes that wait already.

        Without `wait` it is told so by False, and has not begun.
        """
        me = threading.get_ident()
        with self._door:
            while self.mode == "drain" and self._overdue and self._holder != me:
                if not wait:
                    return False
                self._door.wait()
            self._generations += 1
            return True

    def end_generation(self) -> None:
        """Say that a generation is over."""
        with self._door:
            self._generations -= 1
            self._door.notify_all()

    @contextmanager
    def interruptible(self, check: Callable[[], None]) -> Iterator[None]:
        """Ask `check` before each step that this thread takes inside the block; what it raises ends the work there."""
        before = self._here.check
        self._here.check = check
        try:
            yield
        finally:
            self._here.check = before

    @contextmanager
    def uninterruptible(self) -> Iterator[None]:
        """Ask nothing inside the block: what this thread has begun to commit is brought to its end."""
        with self.interruptible(_nothing):
            yield

    @property
    def changes_waiting(self) -> int:
        """How many changes are at the door."""
        with self._door:
            return len(self._overdue)

    def _leave(self, began: float | None = None) -> None:
        with self._door:
            self._depth -= 1
            if self._depth == 0:
                share = self._shares.get(threading.get_ident())
                if share is not None and began is not None:
                    share.left = time.monotonic()
                    share.used += share.left - began
                self._holder = None
                self._door.notify_all()

    def _share_of(self, thread: int) -> _Share:
        """What a thread has used; one that is new, or was away, begins with what the most frugal of the others has."""
        now = time.monotonic()
        self._shares = {
            each: share
            for each, share in self._shares.items()
            if share.waits or each == self._holder or now - share.left < _GONE
        }
        if thread not in self._shares:
            least = min((share.used for share in self._shares.values()), default=0.0)
            self._shares[thread] = _Share(least, now)
        mine = self._shares[thread]
        mine.used = max(mine.used, max(share.used for share in self._shares.values()) - _CLAIM)
        return mine

    def _other_is_due(self, mine: _Share) -> bool:
        """Whether a thread that has used less, or as much and came first, waits too, or will be back any moment."""
        now = time.monotonic()
        for share in self._shares.values():
            if share is mine or share.used > mine.used:
                continue
            if share.waits:
                if share.used < mine.used or share.waits < mine.waits:
                    return True
            elif share.used < mine.used and now - share.left < _BACK_SOON:
                return True
        return False

    def _change_is_next(self) -> bool:
        """Whether a step has to let a change go first."""
        if self.mode == "refresh":
            return bool(self._overdue)
        # Steps of generations that have begun go on; the change comes when the last of them is over.
        return any(not self._waits_for_generations(overdue) for overdue in self._overdue)

    def _waits_for_generations(self, overdue: float) -> bool:
        return self.mode == "drain" and self._generations > 0 and time.monotonic() < overdue
