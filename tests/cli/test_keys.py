"""`liveweight keys`, while another process has the workspace open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from liveweight.cli import app
from liveweight.ledger import Ledger
from liveweight.server.keys import Keyring

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The program on a workspace that is open."""
    monkeypatch.setenv("LIVEWEIGHT_WORKSPACE", str(tmp_path))

    def invoke(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, ["keys", *words])
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        return result

    with Ledger.open(tmp_path):
        yield invoke


@pytest.mark.parametrize("verb", ["create", "list", "revoke"])
def test_every_verb_explains_itself(run: Run, verb: str) -> None:
    shown = run(verb, "--help").stdout
    assert "--json" in shown and "--workspace" in shown


def test_the_secret_alone_is_on_stdout_once_and_opens_the_server(run: Run, tmp_path: Path) -> None:
    made = run("create", "alice", "--role", "editor")
    secret = made.stdout.removesuffix("\n")
    assert "not be shown again" in " ".join(made.stderr.split())
    assert secret not in made.stderr
    keyring = Keyring(tmp_path)
    found = keyring.find(secret)
    assert found is not None
    assert (found.name, found.role) == ("alice", "editor")
    listed = run("list").stdout
    assert "alice" in listed and secret[:12] in listed and secret not in listed
    assert "revoked" in run("revoke", "alice").stdout
    assert [key.revoked_at is None for key in keyring.list()] == [False]
    keyring.close()


def test_programs_read_keys_as_json(run: Run) -> None:
    made = json.loads(run("create", "bob", "--role", "chat", "--json").stdout)
    assert (made["label"], made["role"], made["secret"][:8]) == ("k1", "chat", "lw-chat-")
    listed = json.loads(run("list", "--json").stdout)
    assert listed == [{name: value for name, value in made.items() if name != "secret"}]
    assert json.loads(run("revoke", "k1", "--json").stdout)["revoked_at"] is not None


def test_no_keys_are_said_to_be_none(run: Run) -> None:
    assert "No keys yet" in run("list").stdout


def test_wrong_words_are_usage_errors(run: Run) -> None:
    assert "--role" in run("create", "alice", code=2).stderr
    assert "admin" in run("create", "alice", "--role", "admin", code=2).stderr
    assert "carol" in run("revoke", "carol", code=2).stderr
    told = json.loads(run("revoke", "carol", "--json", code=2).stderr)
    assert told["code"] == "invalid_input"
