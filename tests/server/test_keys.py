"""Keys: made, recognised, revoked, beside a process that has the workspace open."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from liveweight.errors import InvalidInput, LedgerUnavailable
from liveweight.ledger import Ledger
from liveweight.ledger.key_table import KeyTable
from liveweight.server.keys import Keyring
from tests.ledger.ledger_examples import Place


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    url = None if request.param == "sqlite" else next(request.getfixturevalue("postgresql"))
    return Place(tmp_path / "workspace", url)


@pytest.fixture
def seconds() -> list[float]:
    """What the keyrings' clock says: the last one counts."""
    return [0.0]


@pytest.fixture
def opened(place: Place, seconds: list[float]) -> Iterator[Callable[[], Keyring]]:
    """Makes keyrings of one workspace, as several processes would."""
    made: list[Keyring] = []

    def make() -> Keyring:
        made.append(Keyring(place.workspace, place.url, clock=lambda: seconds[-1]))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def keyring(opened: Callable[[], Keyring]) -> Keyring:
    return opened()


def test_a_key_is_recognised_by_its_secret_alone(keyring: Keyring) -> None:
    assert not keyring.any()
    key, secret = keyring.create("alice", "editor")
    chat, other = keyring.create("bob", "chat")
    assert secret.startswith("lw-edit-") and other.startswith("lw-chat-")
    assert len(secret) == len("lw-edit-") + 43  # 256 bits
    assert (key.label, key.name, key.role, key.may_edit) == ("k1", "alice", "editor", True)
    assert (chat.may_edit, chat.shown) == (False, other[:12])
    for written, owner in ((secret, "alice"), (other, "bob")):
        found = keyring.find(written)
        assert found is not None
        assert found.name == owner
    for wrong in ("", secret[:-1], secret + "x", secret.swapcase(), "lw-edit-", "\x00", "é\ud83d", "x" * 10_000):
        assert keyring.find(wrong) is None
    assert keyring.any()


def test_what_is_kept_of_a_key_is_its_hash(keyring: Keyring, place: Place) -> None:
    _, secret = keyring.create("alice", "chat")
    table = KeyTable(place.workspace, place.url)
    assert [written for written, _ in table.all()] == [hashlib.sha256(secret.encode()).hexdigest()]
    table.close()
    if place.url is None:
        assert not any(secret[12:].encode() in path.read_bytes() for path in place.workspace.glob("ledger.sqlite3*"))


def test_keys_are_made_and_revoked_while_another_has_the_workspace_open(place: Place) -> None:
    with place.open() as ledger:
        keyring = Keyring(place.workspace, place.url)
        key, secret = keyring.create("alice", "chat")
        assert keyring.find(secret) is not None
        assert keyring.revoke("alice").revoked_at is not None
        assert keyring.find(secret) is None
        assert [each.name for each in keyring.list()] == ["alice"]
        assert key.revoked_at is None  # it was not when it was made
        assert ledger.events() == []
        keyring.close()
        keyring.close()


def test_a_key_that_another_process_made_is_known_at_once(opened: Callable[[], Keyring], seconds: list[float]) -> None:
    server, command_line = opened(), opened()
    assert not server.any()
    seconds.append(0.1)  # the time that another process takes to start
    _, secret = command_line.create("alice", "chat")
    assert server.any()
    assert server.find(secret) is not None


def test_a_revocation_elsewhere_counts_within_a_second_and_one_here_at_once(
    opened: Callable[[], Keyring], seconds: list[float]
) -> None:
    server, command_line = opened(), opened()
    _, first = server.create("first", "chat")
    _, second = server.create("second", "chat")
    assert server.find(first) is not None and server.find(second) is not None
    server.revoke("first")
    assert server.find(first) is None
    command_line.revoke("k2")
    seconds.append(1.01)
    assert server.find(second) is None
    assert server.any()  # nobody gets in, rather than everybody


def test_knowing_a_key_asks_the_database_once_a_second(
    keyring: Keyring, seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = keyring.create("alice", "chat")
    asked: list[float] = []
    read = KeyTable.all
    monkeypatch.setattr(KeyTable, "all", lambda table: asked.append(seconds[-1]) or read(table))
    for at in (0.0, 0.5, 0.9, 1.1, 1.9, 2.3):
        seconds.append(at)
        assert keyring.find(secret) is not None
    assert asked == [0.0, 1.1, 2.3]


def test_the_last_use_is_written_down_once_a_minute(
    opened: Callable[[], Keyring], seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring = opened()
    key, secret = keyring.create("alice", "chat")
    written: list[datetime] = []
    note = KeyTable.used
    monkeypatch.setattr(KeyTable, "used", lambda table, number, at: written.append(at) or note(table, number, at))
    keyring.find(secret)
    keyring.find(secret)
    assert [each.last_used_at for each in keyring.list()] == written
    assert len(written) == 1
    opened().find(secret)  # another process sees that it was noted
    assert len(written) == 1
    long_ago = datetime.now(UTC) - timedelta(minutes=2)
    note(keyring._table, key.id, long_ago)
    opened().find(secret)
    assert len(written) == 2


def test_a_use_that_cannot_be_written_down_keeps_nobody_out(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(table: KeyTable, number: int, at: datetime) -> None:
        raise LedgerUnavailable("gone")

    _, secret = keyring.create("alice", "chat")
    monkeypatch.setattr(KeyTable, "used", fail)
    assert keyring.find(secret) is not None
    assert "not written down" in caplog.text


@pytest.mark.parametrize("name", ["", "k3", "3", "-a", "a b", "a\n", "ä", "a" * 65, "\x00"])
def test_a_name_is_a_word_and_unlike_an_id(keyring: Keyring, name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be the name"):
        keyring.create(name, "chat")


def test_a_name_is_given_once_and_for_all(keyring: Keyring) -> None:
    keyring.create("alice", "chat")
    keyring.revoke(1)
    with pytest.raises(InvalidInput, match="already, or was one"):
        keyring.create("alice", "editor")
    with pytest.raises(InvalidInput, match="role"):
        keyring.create("bob", "admin")  # type: ignore[arg-type]


def test_a_key_is_revoked_by_name_or_id_and_stays_so(keyring: Keyring) -> None:
    with pytest.raises(InvalidInput, match="no key yet"):
        keyring.revoke("alice")
    for name in ("alice", "bob", "k"):
        keyring.create(name, "chat")
    revoked = [keyring.revoke(written) for written in ("bob", "k1", 3)]
    assert [key.name for key in revoked] == ["bob", "alice", "k"]
    assert keyring.revoke("bob") == revoked[0]
    for unknown in ("carol", "k9", "0", "\x00"):
        with pytest.raises(InvalidInput, match=r"There are alice, bob, k\."):
            keyring.revoke(unknown)


def test_a_workspace_that_is_not_there_yet_is_made(place: Place) -> None:
    Keyring(place.workspace, place.url).close()
    with Ledger.open(place.workspace, place.url) as ledger:
        assert ledger.models() == []
