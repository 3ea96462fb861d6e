"""Where the ledger's tests keep their ledgers: a SQLite file each, and a database each in a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from liveweight.ledger import Ledger
from tests.ledger.ledger_examples import MODEL, Place


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
