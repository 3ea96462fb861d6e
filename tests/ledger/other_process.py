"""What the ledger's tests run in a second process, and how they start one.

A server process imports everything once and forks from there, so that a killed child costs milliseconds to replace.
"""

from __future__ import annotations

import errno
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from liveweight.errors import LiveweightError
from liveweight.ledger import Ledger
from tests.ledger.ledger_examples import MODEL, proposal


@contextmanager
def running(task: Callable[..., None], *given: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    """A child that runs `task(pipe, *given)`, and our end of the pipe. It is killed in the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["liveweight.ledger", "psycopg"])
    ours, theirs = context.Pipe()
    child = context.Process(target=task, args=(theirs, *given), daemon=True)
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join()
        ours.close()


def hold(pipe: Connection, workspace: Path, url: str | None) -> None:
    """Keep the ledger open until told to stop."""
    with Ledger.open(workspace, url):
        pipe.send("open")
        pipe.recv()


def try_to_open(pipe: Connection, workspace: Path, url: str | None) -> None:
    """Send what opening gives: an error's code and its details, or None."""
    try:
        Ledger.open(workspace, url).close()
        pipe.send(None)
    except LiveweightError as error:
        pipe.send(error.as_dict())


def stop_half_way(pipe: Connection, workspace: Path, url: str | None) -> None:
    """Make one change, write down the next, say so, and go no further."""
    with Ledger.open(workspace, url) as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        first = ledger.activate(ledger.intend(proposal(0)).id)
        ledger.intend(proposal(1), replaces=[first.id])
        pipe.send("half way")
        pipe.recv()


def commit_in_a_loop(pipe: Connection, workspace: Path, url: str | None) -> None:
    """Make changes without end, saying before each step what will be and after it that it is.

    A change is named by its position: a transaction that a kill cuts off may use up an id on a server.
    """
    with Ledger.open(workspace, url) as ledger:
        ledger.recover()
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        while True:
            seed = len(ledger.changes())
            pipe.send(("begin", seed + 1, "intended", 1.0))
            change = ledger.intend(proposal(seed))
            pipe.send(("begin", change.position, "active", 1.0))
            ledger.activate(change.id)
            pipe.send(("done",))
            for wish, strength in (("active", 0.5), ("off", 0.5), ("active", 0.75)):
                if change.position % 3 == 0:
                    break
                pipe.send(("begin", change.position, wish, strength))
                intent = ledger.intend_move(change.id, None if wish == change.state else wish, strength=strength)
                change = ledger.change(change.id) if ledger.finish(intent.id) else change
                pipe.send(("done",))


def fill_the_disk(pipe: Connection, workspace: Path, url: str | None, what: str) -> None:
    """Commit one change, then let no file grow as one more is tried, then free the disk and commit a last one."""
    errors: list[Any] = []
    with Ledger.open(workspace, url) as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        ledger.activate(ledger.intend(proposal(1)).id)
        journal = workspace / "ledger.sqlite3-wal"
        limit = journal.stat().st_size if what == "database" else 100
        before = len(ledger.events())
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            ledger.intend(proposal(2, report={"text": "x" * 100_000}))
        except LiveweightError as error:
            errors.append((error.code, isinstance(error, OSError), error.errno in (None, errno.ENOSPC, errno.EFBIG)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        errors.append([len(ledger.changes()), len(ledger.events()) - before, ledger.verify()])
        ledger.activate(ledger.intend(proposal(3)).id)
    pipe.send(errors)
