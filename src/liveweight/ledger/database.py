"""The database under the ledger: how it is reached, brought up to date, and what its errors mean.

Owns URLs, connection settings, migrations and the translation of driver errors. Knows nothing of the rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import StaticPool

from liveweight.errors import (
    InvalidInput,
    LedgerDamaged,
    LedgerUnavailable,
    LiveweightError,
    NoSpace,
    Unsupported,
    WorkspaceBusy,
)
from liveweight.ledger.lock import process_name
from liveweight.ledger.records import to_json
from liveweight.ledger.tables import Base

FILE_NAME = "ledger.sqlite3"
_REVISIONS = "ledger_revision"
_WRITES = "liveweight_writes"
_SQLITE_NO_SPACE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
)


def database_url(workspace: Path, url: str | None) -> URL:
    """Where the ledger is: in the workspace, or where `url` says.

    Raises InvalidInput for a URL that is none or names no database, Unsupported for another kind of database.
    """
    if url is None:
        return URL.create("sqlite", database=str(workspace / FILE_NAME))
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InvalidInput(
            "The ledger's URL cannot be read.", hint="It looks like postgresql+psycopg://user@host/database."
        ) from error
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql"):
        raise Unsupported(f"A ledger cannot be kept in {kind}.", hint="Use sqlite:///FILE or postgresql+psycopg://….")
    if kind == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise InvalidInput("The ledger's URL names no file.", hint="Use sqlite:///FILE, or leave the URL out.")
    return parsed


def sqlite_file(url: URL) -> Path | None:
    """The file of a SQLite URL; None for a server."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def describe(url: URL) -> str:
    """The database as people may read it, without its password."""
    return url.database or "" if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


def connect(url: URL, *, read_only: bool) -> Engine:
    """An engine with the settings that durability needs. Raises Unsupported when the driver is not installed."""
    try:
        if url.get_backend_name() == "sqlite":
            engine = create_engine(url, json_serializer=to_json, connect_args={"check_same_thread": False})
            _configure_sqlite(engine, read_only=read_only)
        else:
            engine = create_engine(
                url,
                json_serializer=to_json,
                isolation_level="REPEATABLE READ",
                connect_args={"application_name": process_name()},
            )
            _configure_postgresql(engine, read_only=read_only)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise Unsupported(
            f"The driver for {url.drivername} is not installed.", hint="Install it: pip install 'liveweight[postgres]'."
        ) from error
    return engine


def to_write(connection: Connection) -> Connection:
    """The same connection, whose transactions are to write; another one's may be under way meanwhile."""
    return connection.execution_options(**{_WRITES: True})


def empty_in_memory() -> Engine:
    """What a reader sees where nothing has been written yet."""
    engine = create_engine(
        "sqlite://", json_serializer=to_json, poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    Base.metadata.create_all(engine)
    return engine


def _configure_sqlite(engine: Engine, *, read_only: bool) -> None:
    # The driver's own transactions begin late and leave DDL out; SQLite's begin where SQLAlchemy says.
    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout = 5000")
        cursor.execute("PRAGMA foreign_keys = ON")
        if read_only:
            cursor.execute("PRAGMA query_only = ON")
        else:
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    # A transaction that reads first and writes then fails where another connection wrote in between, so one that is
    # to write takes the file's write lock at once, and waits for it.
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(_WRITES) else "BEGIN")

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)


def _configure_postgresql(engine: Engine, *, read_only: bool) -> None:
    def prepare(connection: Any, _: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit = on")
            if read_only:
                cursor.execute("SET default_transaction_read_only = on")
        connection.commit()

    event.listen(engine, "connect", prepare)


def _alembic(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def condition(connection: Connection, place: str) -> Literal["empty", "old", "current"]:
    """How the database compares with what this program writes.

    Raises Unsupported when it is newer, InvalidInput when it holds another program's tables of the same names.
    """
    current = MigrationContext.configure(connection, opts={"version_table": _REVISIONS}).get_current_revision()
    if current is None:
        taken = set(inspect(connection).get_table_names()) & set(Base.metadata.tables)
        if taken:
            raise InvalidInput(
                f"{place} already has a table {min(taken)!r} that is not a ledger's.",
                hint="Give the ledger a database of its own.",
            )
        return "empty"
    known = [script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()]
    if current not in known:
        raise Unsupported(
            f"The ledger {place} was written by a newer liveweight (revision {current}; this one knows {known[0]}).",
            hint="Upgrade liveweight, or choose another workspace.",
            revision=current,
        )
    return "current" if current == known[0] else "old"


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring the database to `revision`, all steps or none."""
    with connection.begin():
        command.upgrade(_alembic(connection), revision)


@contextmanager
def translated(place: str) -> Iterator[None]:
    """Turn what the database driver raises into the errors that users know."""
    try:
        yield
    except DBAPIError as error:
        raise _explain(error, place) from error


def _explain(error: DBAPIError, place: str) -> LiveweightError:
    original = error.orig
    reason = str(original).strip().splitlines()[0] if str(original).strip() else type(original).__name__
    code = getattr(original, "sqlite_errorcode", None)
    state = getattr(original, "sqlstate", None) or ""
    primary = None if code is None else code & 0xFF
    if primary == sqlite3.SQLITE_FULL or code in _SQLITE_NO_SPACE or state == "53100":
        return NoSpace(
            f"The ledger {place} cannot grow: {reason}.", hint="Free some space and try again; nothing was recorded."
        )
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return WorkspaceBusy(f"Another process is writing to the ledger {place}.", hint="Close it and try again.")
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or state.startswith("XX"):
        return LedgerDamaged(f"The ledger {place} is damaged: {reason}.", hint="Restore the file from a backup.")
    return LedgerUnavailable(
        f"The ledger {place} cannot be used: {reason}.",
        hint="Check that the database is there, that it runs, and that you may write to it; then start again.",
    )
