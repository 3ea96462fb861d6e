"""Two processes, killed processes, and full disks."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from liveweight.adjustments import Active
from liveweight.errors import LedgerUnavailable, WorkspaceBusy
from liveweight.ledger import Ledger
from tests.ledger.ledger_examples import MODEL, Place, adjustment, commit, say
from tests.ledger.other_process import commit_in_a_loop, fill_the_disk, hold, running, stop_half_way, try_to_open

KILLS = int(os.environ.get("LIVEWEIGHT_TEST_KILLS", "8"))


def test_a_second_process_is_told_which_one_has_the_workspace_open(place: Place) -> None:
    with running(hold, place.workspace, place.url) as (child, pipe):
        assert pipe.recv() == "open"
        with pytest.raises(WorkspaceBusy, match=f"process {child.pid} ") as caught:
            place.open()
        assert caught.value.details["pid"] == child.pid
        with place.open(read_only=True) as reader:
            assert reader.changes() == []
    place.open().close()  # the lock went with the killed process


def test_the_holder_keeps_its_workspace_when_another_process_tries(place: Place) -> None:
    with place.open() as ledger:
        for _ in range(2):
            with running(try_to_open, place.workspace, place.url) as (_, pipe):
                told = pipe.recv()
            assert told["code"] == "workspace_busy"
            assert told["pid"] == os.getpid()
        with pytest.raises(WorkspaceBusy, match="This process already"):
            place.open()
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")


def test_two_workspaces_cannot_share_one_database_at_a_time(place: Place, tmp_path: Path) -> None:
    url = place.url or f"sqlite:///{tmp_path}/shared.db"
    with running(hold, place.workspace, url) as (child, pipe):
        assert pipe.recv() == "open"
        with pytest.raises(WorkspaceBusy, match=f"process {child.pid} "):
            Ledger.open(tmp_path / "another", url)
        Ledger.open(tmp_path / "another").close()  # its folder was let go


def test_a_lost_connection_to_the_server_ends_writing_because_the_lock_went_with_it(
    postgresql_place: Place,
) -> None:
    place = postgresql_place
    with place.open() as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        change = commit(ledger)
        with ledger._engine.connect() as connection:
            connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"))
        for _ in range(2):
            with pytest.raises(LedgerUnavailable):
                commit(ledger, 1)
        assert ledger.changes() == [change]
    with place.open() as ledger:
        commit(ledger, 1)


def test_what_a_killed_process_left_half_made_is_closed_and_said(place: Place) -> None:
    with running(stop_half_way, place.workspace, place.url) as (_, pipe):
        assert pipe.recv() == "half way"
    with place.open() as ledger:
        assert [change.state for change in ledger.changes()] == ["active", "intended"]
        said = ledger.recover()
        assert ["c2" in said[0], "`on c2`" in said[0], len(said)] == [True, True, 1]
        assert [change.state for change in ledger.changes()] == ["active", "off"]
        assert ledger.state(MODEL) == (Active(adjustment(0)),)


def test_threads_of_one_process_may_write_and_read_at_once(ledger: Ledger) -> None:
    def talk(_: int) -> list[int]:
        found = [say(ledger).id for _ in range(10)]
        assert ledger.reply(found[0]).text == "Hoi An"
        return found

    with ThreadPoolExecutor(4) as threads:
        written = [number for numbers in threads.map(talk, range(4)) for number in numbers]
    assert sorted(written) == [reply.id for reply in reversed(ledger.replies())] == list(range(1, 41))
    assert len(ledger.events()) == 41


def test_nothing_acknowledged_is_lost_when_the_process_is_killed_at_any_instant(place: Place) -> None:
    known: dict[int, tuple[str, float]] = {}
    for kill in range(KILLS):
        chance = random.Random(kill)
        with running(commit_in_a_loop, place.workspace, place.url) as (child, pipe):
            in_flight = _listen(pipe, known, chance)
            child.kill()
            child.join()
            in_flight = _drain(pipe, known, in_flight)
        with place.open() as ledger:
            said = ledger.recover()
            _check(ledger, known, in_flight, said)
    assert len(known) >= KILLS


def _listen(pipe: Connection, known: dict[int, tuple[str, float]], chance: random.Random) -> Any:
    """Follow the child until an instant nobody can foresee."""
    in_flight = None
    for _ in range(chance.randint(2, 12)):
        in_flight = _note(pipe.recv(), known, in_flight)
    deadline = time.monotonic() + chance.random() * 0.02
    while (left := deadline - time.monotonic()) > 0 and pipe.poll(left):
        in_flight = _note(pipe.recv(), known, in_flight)
    return in_flight


def _drain(pipe: Connection, known: dict[int, tuple[str, float]], in_flight: Any) -> Any:
    """What the child still said before it died."""
    try:
        while pipe.poll(0):
            in_flight = _note(pipe.recv(), known, in_flight)
    except (EOFError, OSError):  # its end of the pipe, perhaps in the middle of a word
        pass
    return in_flight


def _note(word: Any, known: dict[int, tuple[str, float]], in_flight: Any) -> Any:
    if word[0] == "begin":
        if in_flight is not None and in_flight[1] == "intended":  # to go on says that the intent is on disk
            known[in_flight[0]] = ("off", in_flight[2])
        return word[1:]
    known[in_flight[0]] = in_flight[1:]
    return None


def _check(ledger: Ledger, known: dict[int, tuple[str, float]], in_flight: Any, said: list[str]) -> None:
    assert ledger.verify() == []
    found = {change.position: change for change in ledger.changes(MODEL)}
    for number, expected in known.items():
        allowed = {expected}
        if in_flight is not None and in_flight[0] == number:
            allowed.add(in_flight[1:])
        assert (found[number].state, found[number].strength) in allowed
    for number in set(found) - set(known):  # written down, but killed before it could say so
        assert in_flight is not None
        assert number == in_flight[0]
        assert found[number].state == "off"
    assert len(said) <= 1
    for sentence in said:
        assert sentence.startswith(f"{found[in_flight[0]].label} ")
    known.update({number: (change.state, change.strength) for number, change in found.items()})
    assert ledger.state(MODEL) == tuple(
        Active(adjustment(position - 1), change.strength)
        for position, change in found.items()
        if change.state == "active"
    )


@pytest.mark.parametrize("what", ["blob", "database"])
def test_a_full_disk_is_said_and_records_nothing_by_halves(tmp_path: Path, what: str) -> None:
    with running(fill_the_disk, tmp_path, None, what) as (_, pipe):
        error, after = pipe.recv()
    assert error == ("no_space", True, True)
    assert after == [1, 0, []]
    with Ledger.open(tmp_path) as ledger:
        assert ledger.recover() == []
        assert [change.state for change in ledger.changes()] == ["active", "active"]
        assert not list(tmp_path.glob("blobs/*/*.part"))
        assert len(ledger.prune_blobs()) == (1 if what == "database" else 0)
