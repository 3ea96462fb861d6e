"""The table of a server's keys, written beside whoever has the ledger open.

Owns connections of its own and one short transaction a call. It takes no lock: keys are no part of what the weights
are, and a key has to be made and revoked while a server runs. Knows nothing of secrets, only of their hashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from liveweight.errors import InvalidInput
from liveweight.ledger import database
from liveweight.ledger.access import Access
from liveweight.ledger.reading import to_record
from liveweight.ledger.records import ApiKey, Role
from liveweight.ledger.tables import KeyRow, now


class KeyTable:
    """The keys of one workspace. Safe to use from several threads; close it in the end."""

    def __init__(self, workspace: Path, url: str | None = None) -> None:
        """Reach the ledger's database; one that is not there or older is made or upgraded first.

        Raises what `Ledger.open` raises; WorkspaceBusy only where there is something to upgrade.
        """
        where = database.database_url(workspace, url)
        self._place = database.describe(where)
        file = database.sqlite_file(where)
        if file is not None and not file.exists():
            Access.open(workspace, url).close()
        self._engine = database.connect(where, read_only=False)
        try:
            with database.translated(self._place), self._engine.begin() as connection:
                found = database.condition(connection, self._place)
            if found != "current":
                Access.open(workspace, url).close()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the database. Closing twice does no harm."""
        self._engine.dispose()

    def add(self, name: str, role: Role, secret_hash: str, shown: str) -> ApiKey:
        """Write a key down. Raises InvalidInput for a name that a key has or had: the ledger says who did what."""
        with self._write() as session:
            if session.scalar(select(KeyRow.id).where(KeyRow.name == name)) is not None:
                raise InvalidInput(
                    f"There is a key {name!r} already, or was one.", hint="Give each key a name of its own."
                )
            row = KeyRow(name=name, role=role, secret_hash=secret_hash, shown=shown)
            session.add(row)
            session.flush()
            return to_record(ApiKey, row)

    def all(self) -> list[tuple[str, ApiKey]]:
        """Every key with the hash of its secret, oldest first; the revoked ones too."""
        with database.translated(self._place), Session(self._engine) as session, session.begin():
            rows = session.scalars(select(KeyRow).order_by(KeyRow.id))
            return [(row.secret_hash, to_record(ApiKey, row)) for row in rows]

    def revoke(self, key: int) -> ApiKey:
        """Make a key useless from now on; one that is already stays as it is."""
        with self._write() as session:
            in_force = (KeyRow.id == key) & KeyRow.revoked_at.is_(None)
            session.execute(update(KeyRow).where(in_force).values(revoked_at=now()))
            return to_record(ApiKey, session.get_one(KeyRow, key))

    def used(self, key: int, at: datetime) -> None:
        """Write down when a key was used last."""
        with self._write() as session:
            session.execute(update(KeyRow).where(KeyRow.id == key).values(last_used_at=at))

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with database.translated(self._place), self._engine.connect() as plain:
            connection = database.to_write(plain)
            if connection.dialect.name == "postgresql":
                # Two processes may write one row at once, such as a revocation and a last use: the later one waits.
                connection = connection.execution_options(isolation_level="READ COMMITTED")
            with Session(connection) as session, session.begin():
                yield session
