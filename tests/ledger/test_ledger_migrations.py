"""A database from nothing, from an older program, and from a newer one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from liveweight.errors import InvalidInput, LedgerDamaged, LedgerUnavailable, Unsupported
from liveweight.ledger import Ledger, database
from liveweight.ledger.tables import Base
from tests.ledger.ledger_examples import MODEL, Place, commit


@contextmanager
def _connection(place: Place) -> Iterator[Connection]:
    place.workspace.mkdir(exist_ok=True)
    engine = database.connect(database.database_url(place.workspace, place.url), read_only=False)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def _make_revision_2(place: Place) -> None:
    """A ledger of before there was a server, with a reply and a line of the journal."""
    with _connection(place) as connection:
        database.upgrade(connection, "2")
        at = {"hash": MODEL, "at": datetime(2026, 1, 2, tzinfo=UTC)}
        with connection.begin():
            connection.execute(text("INSERT INTO models VALUES (:hash, 'tiny', 'tests/tiny', 'llama', :at)"), at)
            connection.execute(
                text("INSERT INTO replies VALUES (1, :hash, '[]', '\"Hanoi\"', '[]', '[]', 1, 'v', '{}', '{}', :at)"),
                at,
            )
            connection.execute(text("INSERT INTO events VALUES (1, 'reply', 'r1', :hash, '{}', :at)"), at)


def _make_revision_1(place: Place) -> None:
    with _connection(place) as connection:
        database.upgrade(connection, "1")
        with connection.begin():
            connection.execute(
                text("INSERT INTO models VALUES (:hash, 'tiny', 'tests/tiny', 'llama', :at)"),
                {"hash": MODEL, "at": datetime(2026, 1, 2, tzinfo=UTC)},
            )


def test_the_migrations_make_exactly_the_tables_that_the_program_maps(place: Place) -> None:
    place.open().close()
    with _connection(place) as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": "ledger_revision", "compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Base.metadata) == []


def test_an_older_ledger_is_upgraded_on_opening_and_keeps_what_it_holds(place: Place) -> None:
    _make_revision_1(place)
    with place.open() as ledger:
        assert [model.hash for model in ledger.models()] == [MODEL]
        change = commit(ledger)
        assert ledger.change(change.id).state == "active"
        with pytest.raises(DBAPIError, match="append-only"), ledger._engine.begin() as connection:
            connection.execute(text("DELETE FROM events"))


def test_what_was_written_before_there_was_a_server_was_made_by_nobody_named(place: Place) -> None:
    _make_revision_2(place)
    with place.open() as ledger:
        old = ledger.reply("r1")
        assert (old.text, old.public_id, old.chat, old.after) == ("Hanoi", None, None, None)
        assert [event.made_by for event in ledger.events()] == [""]
        for statement in ("DELETE FROM events", "UPDATE events SET made_by = 'me'"):
            with pytest.raises(DBAPIError, match="append-only"), ledger._engine.begin() as connection:
                connection.execute(text(statement))


def test_a_reader_upgrades_an_older_ledger_too(place: Place) -> None:
    _make_revision_1(place)
    with place.open(read_only=True) as reader:
        assert [model.hash for model in reader.models()] == [MODEL]
    with _connection(place) as connection:
        assert database.condition(connection, "here") == "current"


def test_opening_twice_upgrades_once(place: Place) -> None:
    for _ in range(2):
        with place.open() as ledger:
            assert ledger.verify() == []


@pytest.mark.parametrize("read_only", [False, True])
def test_a_ledger_from_a_newer_program_is_refused_and_left_alone(place: Place, read_only: bool) -> None:
    place.open().close()
    with _connection(place) as connection, connection.begin():
        connection.execute(text("UPDATE ledger_revision SET version_num = '900'"))
    with pytest.raises(Unsupported, match=r"newer liveweight \(revision 900") as caught:
        place.open(read_only=read_only)
    assert "Upgrade liveweight" in caught.value.hint
    with _connection(place) as connection:
        assert connection.execute(text("SELECT version_num FROM ledger_revision")).scalar() == "900"


def test_a_database_with_another_programs_tables_is_refused(place: Place) -> None:
    with _connection(place) as connection, connection.begin():
        connection.execute(text("CREATE TABLE events (id INTEGER)"))
    with pytest.raises(InvalidInput, match="'events'"):
        place.open()


def test_a_step_that_cannot_be_finished_leaves_the_database_as_it_was(place: Place) -> None:
    _make_revision_1(place)
    with _connection(place) as connection:
        in_the_way = (
            "CREATE TRIGGER events_DELETE AFTER DELETE ON models BEGIN SELECT 1; END"
            if place.url is None
            else "CREATE FUNCTION refuse_to_rewrite_events() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'"
        )
        with connection.begin():
            connection.execute(text(in_the_way))
    with pytest.raises(LedgerUnavailable, match="already exists"):
        place.open()
    with _connection(place) as connection, connection.begin():
        assert database.condition(connection, "here") == "old"
        made = "SELECT count(*) FROM sqlite_master WHERE name = 'events_UPDATE'"
        if place.url is None:
            assert connection.execute(text(made)).scalar() == 0


def test_a_file_that_is_no_database_is_said_to_be_damaged(tmp_path: Path) -> None:
    (tmp_path / database.FILE_NAME).write_text("not a database, but long enough to be looked at as one" * 40)
    with pytest.raises(LedgerDamaged, match="not a database"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("nonsense", InvalidInput),
        ("sqlite://", InvalidInput),
        ("mysql://host/database", Unsupported),
        ("postgresql+nodriver://host/database", Unsupported),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(tmp_path: Path, url: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        Ledger.open(tmp_path / "w", url)


def test_a_server_that_is_not_there_is_named_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match="cannot be used") as caught:
        Ledger.open(tmp_path / "w", f"postgresql+psycopg://me:secret@/nothing?host={tmp_path}")
    assert "secret" not in str(caught.value)
    Ledger.open(tmp_path / "w").close()  # the lock was let go


def test_a_sqlite_file_elsewhere_can_be_the_ledger(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/elsewhere/my ledger.db"
    with Ledger.open(tmp_path / "w", url) as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        commit(ledger)
    assert (tmp_path / "elsewhere" / "my ledger.db").exists()
    with Ledger.open(tmp_path / "w", url, read_only=True) as reader:
        assert len(reader.changes()) == 1
