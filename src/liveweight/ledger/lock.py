"""One process a workspace.

Owns the locks that keep a second process out: a file lock on this machine, and an advisory lock where the database is
a server that other machines reach too. Both are the operating system's or the server's, so they go with the process,
however it ends. Knows nothing of what is protected.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from liveweight.errors import LedgerUnavailable, NoSpace, WorkspaceBusy

_HINT = "Close it first, or choose another workspace."
_ADVISORY = {"space": 0x6C697665, "number": 0x77}  # any pair will do, so long as it never changes
_LOCK_NOT_AVAILABLE = "55P03"

_TAKE = text("SELECT pg_advisory_lock(:space, :number)")
_HOLDER = text(
    "SELECT holder.application_name FROM pg_locks AS held JOIN pg_stat_activity AS holder USING (pid)"
    " WHERE held.locktype = 'advisory' AND held.granted AND held.classid = :space AND held.objid = :number"
    " AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


def process_name() -> str:
    """How this process introduces itself to the database server; at most 63 bytes."""
    return f"liveweight, process {os.getpid()} on {socket.gethostname()}"[:63]


class FolderLock:
    """An exclusive lock beside `protected` (a folder or a file), with the holder's process id in a file next to it."""

    def __init__(self, protected: Path) -> None:
        """Nothing is taken yet."""
        self._protected = protected
        base = protected / "ledger" if protected.is_dir() else protected
        self._holder = base.with_name(f"{base.name}.pid")
        # Not bound to a thread: a server may close the ledger from another one than opened it.
        self._lock = FileLock(base.with_name(f"{base.name}.lock"), timeout=0, thread_local=False)

    def take(self) -> None:
        """Raises WorkspaceBusy, naming the process that holds it, NoSpace or LedgerUnavailable."""
        try:
            self._lock.acquire()
        except Timeout as error:
            raise self._busy() from error
        except OSError as error:
            raise LedgerUnavailable(
                f"{self._protected} cannot be locked: {error}.", hint="Check that you may write there."
            ) from error
        try:
            self._holder.write_text(str(os.getpid()), "ascii")
        except OSError as error:
            self._lock.release()
            raise NoSpace(
                f"{self._holder} cannot be written: {error}.", hint="Free some space and try again."
            ) from error

    def give_back(self) -> None:
        """Let the next process in."""
        with suppress(FileNotFoundError):
            self._holder.unlink()
        self._lock.release()

    def _busy(self) -> WorkspaceBusy:
        try:
            pid = int(self._holder.read_text("ascii"))
        except (OSError, ValueError):  # the holder has the lock but has not yet written, or has just gone
            return WorkspaceBusy(f"Another process has {self._protected} open.", hint=_HINT, pid=None)
        who = "This process already" if pid == os.getpid() else f"The process {pid}"
        return WorkspaceBusy(f"{who} has {self._protected} open.", hint=_HINT, pid=pid)


def take_advisory_lock(connection: Connection, place: str) -> None:
    """Hold PostgreSQL's advisory lock for as long as `connection` lives. Raises WorkspaceBusy when another has it.

    A killed process's session ends a moment after the process, so this waits a second before it gives up.
    """
    try:
        with connection.begin():
            connection.execute(text("SET LOCAL lock_timeout = '1s'"))
            connection.execute(_TAKE, _ADVISORY)
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
        with connection.begin():
            holder = connection.execute(_HOLDER, _ADVISORY).scalar()
        who = holder or "another process"
        raise WorkspaceBusy(f"The ledger {place} is open in {who}.", hint=_HINT, holder=holder) from error
