"""Who is at work: the name that changes and the journal carry, and the job that they belong to.

Owns the context variable and nothing else. A context variable does not cross threads by itself: a thread that works
for somebody says so itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from liveweight.errors import InvalidInput


@dataclass(frozen=True)
class Actor:
    """Who writes. `name` is empty where nobody was named; `job` is the job's id, where one is worked on."""

    name: str = ""
    job: int | None = None


_ACTING: ContextVar[Actor] = ContextVar("liveweight.actor", default=Actor())  # noqa: B039 # frozen


@contextmanager
def acting_as(name: str, *, job: int | None = None) -> Iterator[None]:
    """What is written to a ledger in this block carries the name, and the job where one is given here or around it.

    What a job writes it writes once: where it is run again after a crash, its feedback, its protected answer and its
    half-made change are found again. Raises InvalidInput for a name that cannot be printed.
    """
    if not name.isprintable():
        raise InvalidInput(f"{name!r} cannot be printed.", hint="Use a name without control characters.")
    before = _ACTING.set(Actor(name, actor().job if job is None else job))
    try:
        yield
    finally:
        _ACTING.reset(before)


def actor() -> Actor:
    """Who is at work here and now."""
    return _ACTING.get()
