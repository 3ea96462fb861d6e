"""How the ledger is opened, locked, brought up to date, written in transactions, and closed.

Owns the connections, the locks and the blobs' folder of one open workspace. Knows nothing of what is recorded.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from liveweight.errors import LedgerUnavailable, NoSpace, StateConflict, Unsupported
from liveweight.interrupts import uninterrupted
from liveweight.ledger import database
from liveweight.ledger.blobs import BlobStore
from liveweight.ledger.lock import FolderLock, take_advisory_lock

_LOG = logging.getLogger(__name__)


class Access:
    """An open workspace: closed with `close` or a with statement."""

    def __init__(
        self, place: str, engine: Engine, writer: Connection | None, blobs: BlobStore, opened: ExitStack
    ) -> None:
        """Use `open`."""
        self.place = place
        self.blobs = blobs
        self._engine = engine
        self._writer = writer
        self._opened = opened
        self._closed = False
        self._mutex = threading.RLock()
        self._depth = 0  # of the blocks that hold the mutex, one in another
        self._session: Session | None = None  # of the transaction that `together` has begun
        self._committed = False  # since listeners were told the last time
        self._listeners: tuple[Callable[[], None], ...] = ()

    @classmethod
    def open(cls, workspace: Path, url: str | None = None, *, read_only: bool = False) -> Self:
        """Open the ledger of a workspace, making or upgrading it as needed.

        `read_only` takes no lock, so it works beside a running process, and writes nothing. Raises WorkspaceBusy,
        LedgerDamaged, LedgerUnavailable, NoSpace, InvalidInput for the URL, Unsupported for a newer ledger.
        """
        where = database.database_url(workspace, url)
        blobs = BlobStore(workspace / "blobs")
        if read_only:
            return cls._open_for_reading(workspace, url, blobs)
        file, place = database.sqlite_file(where), database.describe(where)
        with ExitStack() as opening:
            _make_folder(workspace)
            _hold(opening, FolderLock(workspace))
            if file is not None and file.parent.resolve() != workspace.resolve():
                _make_folder(file.parent)
                _hold(opening, FolderLock(file))
            engine = database.connect(where, read_only=False)
            opening.callback(engine.dispose)
            with database.translated(place):
                # The writer is the connection that holds the server's lock: no lock, no write.
                writer = database.to_write(opening.enter_context(engine.connect()))
                if file is None:
                    take_advisory_lock(writer, place)
                with writer.begin():
                    found = database.condition(writer, place)
                if found != "current":
                    database.upgrade(writer)
            return cls(place, engine, writer, blobs, opening.pop_all())

    @classmethod
    def _open_for_reading(cls, workspace: Path, url: str | None, blobs: BlobStore) -> Self:
        where = database.database_url(workspace, url)
        file, place = database.sqlite_file(where), database.describe(where)
        with ExitStack() as opening:
            engine = database.empty_in_memory()
            if file is None or file.exists():
                engine = database.connect(where, read_only=True)
                opening.callback(engine.dispose)
                with database.translated(place), engine.begin() as connection:
                    found = database.condition(connection, place)
                if found == "old":
                    opening.close()
                    cls.open(workspace, url).close()
                    return cls._open_for_reading(workspace, url, blobs)
                if found == "empty":
                    engine = database.empty_in_memory()
            opening.callback(engine.dispose)
            return cls(place, engine, None, blobs, opening.pop_all())

    def close(self) -> None:
        """Let go of the database and the lock. Closing twice does no harm."""
        with self._mutex:
            self._closed = True
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def on_commit(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have `listener` called after each committed transaction; what is returned ends that.

        It is called in the thread that wrote, which holds nothing of the ledger any more. What it raises is only
        logged.
        """

        def call() -> None:  # of its own, so that one that is given twice can be taken away once
            listener()

        with self._mutex:
            self._listeners = (*self._listeners, call)

        def end() -> None:
            with self._mutex:
                self._listeners = tuple(each for each in self._listeners if each is not call)

        return end

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make all that is written in this block one transaction: all of it is durable when it ends, or nothing is.

        Reading inside the block still sees what was there before it.
        """
        with self._write() as session:
            around, self._session = self._session, session
            try:
                yield
            finally:
                self._session = around

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other writers out; who listens is told of what was committed when the outermost such block is over."""
        news = False
        try:
            with self._mutex:
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
                    if self._depth == 0:
                        news, self._committed = self._committed, False
        finally:
            if news:
                self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            try:
                listener()
            except Exception:
                _LOG.exception("A listener to the ledger failed.")

    @contextmanager
    def _write(self) -> Iterator[Session]:
        """One transaction: all of it is durable when the block ends, or none of it ever was.

        A Ctrl-C waits until it is over: in its middle it would cost the connection.
        """
        with uninterrupted(), self._alone():
            self._require_open()
            if self._writer is None:
                raise _reading_only()
            if self._writer.invalidated:  # with the connection went the lock: another process may have written since
                raise LedgerUnavailable(f"The connection to {self.place} was lost.", hint="Open the ledger again.")
            if self._session is not None:
                with database.translated(self.place), self._session.begin_nested():
                    yield self._session
                return
            with database.translated(self.place), Session(self._writer) as session, session.begin():
                yield session
            self._committed = True

    @contextmanager
    def _read(self) -> Iterator[Session]:
        self._require_open()
        with database.translated(self.place), Session(self._engine) as session, session.begin():
            yield session

    def _require_open(self) -> None:
        if self._closed:
            raise StateConflict(f"The ledger {self.place} is closed.", hint="Open it again.")

    def _require_writable(self) -> None:
        self._require_open()
        if self._writer is None:
            raise _reading_only()


def _reading_only() -> Unsupported:
    return Unsupported("This ledger is open for reading only.", hint="Open it without read_only.")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind = NoSpace if error.errno == errno.ENOSPC else LedgerUnavailable
        raise kind(f"The folder {folder} cannot be made: {error}.", hint="Choose another workspace.") from error


def _hold(opening: ExitStack, lock: FolderLock) -> None:
    lock.take()
    opening.callback(lock.give_back)
