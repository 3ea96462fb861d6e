"""Where the ledger's tests keep their ledgers: a SQLite file each, and a database each in a real PostgreSQL."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from liveweight.ledger import Ledger
from tests.ledger import private_postgresql
from tests.ledger.ledger_examples import MODEL, Place
from tests.requirements_present import require


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Iterator[str]]:
    """URLs of fresh databases, one after another, in a server that runs for the whole session."""
    require(find_spec("psycopg") is not None, "psycopg is not installed")
    why = private_postgresql.missing()
    require(not why, why)
    import psycopg

    def fresh(folder: str) -> Iterator[str]:
        for number in itertools.count():
            with psycopg.connect(f"host={folder} user=liveweight dbname=postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE ledger_{number}")
            yield f"postgresql+psycopg://liveweight@/ledger_{number}?host={folder}"

    with private_postgresql.server() as folder:
        yield fresh(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    url = None if request.param == "sqlite" else next(request.getfixturevalue("postgresql"))
    return Place(tmp_path / "workspace", url)


@pytest.fixture
def postgresql_place(postgresql: Iterator[str], tmp_path: Path) -> Place:
    return Place(tmp_path / "workspace", next(postgresql))


@pytest.fixture
def ledger(place: Place) -> Iterator[Ledger]:
    """An open ledger that knows MODEL."""
    with place.open() as opened:
        opened.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        yield opened
