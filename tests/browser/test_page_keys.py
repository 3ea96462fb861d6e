"""The page where keys exist: who gets in, and who may change the model."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.serving import Served, Visitor, served
from tests.browser.test_page import ask, fix
from tests.tiny_workspace import QUESTION

pytestmark = pytest.mark.browser

Come = Callable[..., Visitor]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("keys")) as found:
        yield found


@pytest.fixture(scope="module")
def secrets(server: Served) -> dict[str, str]:
    """The secret of a key of each role."""
    return {role: server.service.keys.create(f"{role}-friend", role)[1] for role in ("chat", "editor")}  # type: ignore[arg-type]


def sign_in(page: Page, secret: str) -> None:
    page.get_by_label("Your key").fill(secret)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator(".nicegui-content[aria-busy]")).to_have_count(0)


def test_a_key_is_asked_for_and_kept_in_a_cookie_that_no_script_reads(
    visitor: Come, server: Served, secrets: dict[str, str]
) -> None:
    me = visitor()
    page = me.open("/changes?change=c1")
    expect(page.get_by_label("Your key")).to_be_focused()
    me.accessible()
    sign_in(page, secrets["editor"])
    expect(page.get_by_role("heading", name="Changes", level=1)).to_be_visible()
    assert page.url == f"{server.address}/changes?change=c1"
    (cookie,) = [each for each in me.context.cookies() if each["name"] == "liveweight-page"]
    assert cookie["httpOnly"] and secrets["editor"] not in cookie["value"]
    secret = Path(server.service.settings.workspace) / "page-secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Your key")).to_be_visible()


def test_a_wrong_key_is_refused_in_words(visitor: Come, secrets: dict[str, str]) -> None:
    me = visitor()
    page = me.open()
    sign_in(page, "lw-edit-guessed")
    expect(page.get_by_role("alert")).to_contain_text("unknown or was revoked")
    me.wrong = [each for each in me.wrong if "401" not in each]  # the browser logs the status that was meant


def test_a_chat_key_chats_and_looks_but_changes_nothing(visitor: Come, secrets: dict[str, str]) -> None:
    page = visitor().open()
    sign_in(page, secrets["chat"])
    turn = ask(page, QUESTION)
    for name in ("Good", "Bad", "Fix"):
        expect(turn.get_by_role("button", name=name)).to_be_disabled()
    expect(turn.get_by_role("button", name="Again")).to_be_enabled()


def test_what_an_editor_changes_carries_their_name(visitor: Come, server: Served, secrets: dict[str, str]) -> None:
    page = visitor().open()
    sign_in(page, secrets["editor"])
    fix(ask(page, QUESTION), "z")
    change = server.service.live.changes()[-1]
    assert (change.made_by, change.state) == ("key:editor-friend", "active")
    server.service.live.undo(change)


def test_a_revoked_key_closes_the_page(visitor: Come, server: Served) -> None:
    key, secret = server.service.keys.create("passing", "editor")
    page = visitor().open()
    sign_in(page, secret)
    turn = ask(page, QUESTION)
    server.service.keys.revoke(key.id)
    turn.get_by_role("button", name="Good").click()
    expect(page.get_by_text("Your key is not good any more")).to_be_visible()
    server.service.live.chat(QUESTION)  # anything that happens makes open pages look again
    expect(page.get_by_label("Your key")).to_be_visible()


def test_an_address_of_another_server_is_not_gone_to_after_signing_in(
    visitor: Come, server: Served, secrets: dict[str, str]
) -> None:
    page = visitor().open("/login?to=%2F%2Felsewhere.example%2F")
    sign_in(page, secrets["chat"])
    expect(page.get_by_label("Your message")).to_be_visible()
    assert page.url == f"{server.address}/"
