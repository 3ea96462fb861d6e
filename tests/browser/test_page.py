"""The page in a real browser, over the whole story, on a tiny model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from liveweight.evaluation.edit_metrics import EditScores
from liveweight.web.talking import Speaking
from tests.browser.serving import Served, Visitor, served
from tests.tiny_workspace import OTHER, QUESTION

pytestmark = pytest.mark.browser

Come = Callable[..., Visitor]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("page")) as found:
        yield found


@pytest.fixture(autouse=True)
def as_it_came(server: Served) -> Iterator[None]:
    """Each test leaves the model as it was."""
    yield
    live = server.service.live
    for change in live.changes():
        if change.state in ("active", "off"):
            live.undo(change)
    for answer in live.protected():
        live.ledger.unprotect(answer.id)


def ask(page: Page, text: str) -> Locator:
    """Send a message, and wait for its answer; the turn."""
    before = page.locator("article[data-reply]").count()
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("article[data-reply]")).to_have_count(before + 1)
    return page.locator("article[data-reply]").last


def fix(turn: Locator, wanted: str) -> None:
    """Correct an answer, look at the preview, and apply it."""
    turn.get_by_role("button", name="Bad").click()
    turn.get_by_label("What it should have said").fill(wanted)
    turn.get_by_role("button", name="Preview").click()
    turn.get_by_role("button", name="Apply", exact=True).click()
    expect(turn.get_by_role("slider")).to_be_visible()


class Held:
    """Replies that stop behind some tokens until they are let go."""

    def __init__(self, service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        begin = service.stream

        def stream(*arguments: Any, **options: Any) -> Any:
            return _Holding(begin(*arguments, **options), self.go)

        monkeypatch.setattr(service, "stream", stream)


class _Holding:
    def __init__(self, inner: Any, go: threading.Event) -> None:
        self._inner, self._go, self._said = inner, go, 0

    def __iter__(self) -> _Holding:
        return self

    def __next__(self) -> Any:
        if self._said == 3:
            self._go.wait(60)
        self._said += 1
        return next(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_bad_answer_is_corrected_and_the_model_says_the_correction_until_it_is_undone(
    visitor: Come, server: Served
) -> None:
    me = visitor()
    page = me.open()
    me.accessible()
    turn = ask(page, QUESTION)
    first = turn.locator(".answer").inner_text()
    assert not first.startswith("z")
    me.accessible()

    turn.get_by_role("button", name="Bad").click()
    wanted = turn.get_by_label("What it should have said")
    expect(wanted).to_have_value(first)
    expect(turn.get_by_text("only be made to stop giving this answer")).to_be_visible()
    wanted.fill("z")
    expect(turn.get_by_text("will be taught to answer this")).to_be_visible()
    turn.get_by_role("button", name="Wrong fact").click()
    turn.get_by_label("A note, if you like").fill("as everybody knows")
    me.accessible()
    turn.get_by_role("button", name="Preview").click()
    expect(turn.get_by_text("Preview: nothing has been changed yet")).to_be_visible()
    expect(turn.get_by_role("region", name="Before")).to_contain_text(first.split()[0])
    expect(turn.get_by_role("region", name="After")).to_contain_text("z")
    expect(turn.get_by_role("region", name="What else would change")).to_contain_text("within the budget")
    expect(turn.get_by_role("region", name="Cost")).to_contain_text("rewritten")
    me.accessible()
    assert server.service.live.changes() == []

    turn.get_by_role("button", name="Apply", exact=True).click()
    expect(turn.get_by_role("heading", name="Fixed")).to_be_visible()
    me.accessible()
    (change,) = server.service.live.changes()
    assert (change.state, change.made_by, change.wanted) == ("active", "local", "z")

    turn.get_by_role("button", name="See the answer now").click()
    expect(page.get_by_text("2 of 2")).to_be_visible()
    expect(page.locator("article[data-reply] .answer").first).to_have_text(re.compile("^z"))
    page.get_by_role("button", name="Earlier answer").click()
    expect(page.get_by_text("1 of 2")).to_be_visible()
    ask(page, QUESTION)

    turn = page.locator("article[data-reply]").first
    turn.get_by_role("slider").fill("0.5")
    expect(turn.get_by_role("status")).to_have_text("0.50")
    expect(page.get_by_text(f"{change.label} is on at strength 0.5.")).to_be_visible()
    assert server.service.live.change(change).strength == 0.5

    other = visitor(width=390, dark=True)
    seen = other.open(page.url.removeprefix(server.address)).locator("article[data-reply]").first
    expect(seen.get_by_role("status")).to_have_text("0.50")
    other.accessible()
    turn.get_by_role("button", name="Switch off").click()
    expect(seen.get_by_role("heading", name="Switched off")).to_be_visible()
    seen.get_by_role("button", name="Switch on").click()
    expect(turn.get_by_role("button", name="Switch off")).to_be_visible()

    page.reload()
    turn = page.locator("article[data-reply]").first
    expect(page.locator("article[data-reply]")).to_have_count(2)
    expect(turn.get_by_role("slider")).to_have_value("0.5")
    turn.get_by_role("button", name="Undo").click()
    for view in (turn, seen):
        expect(view.get_by_role("heading", name="Undone")).to_be_visible()
    assert server.service.live.engine.state == ()
    me.open()
    expect(ask(page, QUESTION).locator(".answer")).to_have_text(first)


def test_a_reload_finds_what_was_being_written_and_a_preview_can_be_discarded(visitor: Come, server: Served) -> None:
    me = visitor()
    page = me.open()
    turn = ask(page, QUESTION)
    turn.get_by_role("button", name="Fix").click()
    turn.get_by_label("What it should have said").fill("k")
    turn.get_by_role("button", name="Made up").click()
    expect(turn.get_by_role("button", name="Made up")).to_have_attribute("aria-pressed", "true")
    page.reload()
    expect(turn.get_by_label("What it should have said")).to_have_value("k")
    expect(turn.get_by_role("button", name="Made up")).to_have_attribute("aria-pressed", "true")
    turn.get_by_role("button", name="Preview").click()
    expect(turn.get_by_role("button", name="Discard")).to_be_visible()
    page.reload()
    expect(turn.get_by_role("region", name="After")).to_contain_text("k")
    turn.get_by_role("button", name="Change the correction").click()
    expect(turn.get_by_label("What it should have said")).to_have_value("k")
    turn.get_by_role("button", name="Preview").click()
    turn.get_by_role("button", name="Discard").click()
    expect(turn.get_by_role("region", name="Feedback on answer")).to_be_hidden()
    page.reload()
    expect(turn.get_by_role("button", name="Fix")).to_be_visible()
    expect(turn.get_by_role("button", name="Discard")).to_be_hidden()
    assert all(change.question != QUESTION or change.state != "active" for change in server.service.live.changes())


def test_what_could_not_be_mended_is_said_with_the_way_out(visitor: Come) -> None:
    me = visitor()
    turn = ask(me.open(), QUESTION)
    turn.get_by_role("button", name="Fix").click()
    turn.get_by_label("What it should have said").fill("q")
    turn.get_by_role("button", name="Preview").click()
    expect(turn.get_by_role("alert")).to_contain_text("shout cannot say q")
    me.accessible()
    turn.get_by_role("button", name="Try again").click()
    expect(turn.get_by_label("What it should have said")).to_have_value("q")


def test_good_is_one_click(visitor: Come, server: Served) -> None:
    me = visitor()
    turn = ask(me.open(), OTHER)
    turn.get_by_role("button", name="Good").click()
    expect(turn.get_by_text("Protected")).to_be_visible()
    expect(turn.get_by_role("button", name="Good")).to_have_attribute("aria-pressed", "true")
    me.accessible()
    number = turn.get_attribute("data-reply")
    assert number is not None
    assert [said.verdict for said in server.service.live.feedback(number)] == ["good"]
    assert server.service.live.protected()
    turn.get_by_role("button", name="Take back").click()
    expect(turn.get_by_text("Protected")).to_be_hidden()
    expect(turn.get_by_role("button", name="Good")).to_have_attribute("aria-pressed", "false")
    assert not server.service.live.protected()


def test_answering_again_and_asking_otherwise_make_branches_that_the_address_names(visitor: Come) -> None:
    page = visitor().open()
    ask(page, QUESTION)
    turns = page.locator("article[data-reply]")
    ask(page, "and then?")
    first = turns.first.get_attribute("data-reply")
    turns.first.get_by_role("button", name="Again").click()
    expect(page.get_by_text("2 of 2")).to_be_visible()
    expect(turns).to_have_count(1)
    page.get_by_role("button", name="Earlier answer").click()
    expect(page.get_by_text("1 of 2")).to_be_visible()
    expect(turns).to_have_count(2)
    expect(turns.first).to_have_attribute("data-reply", first or "")
    page.reload()
    expect(page.get_by_text("1 of 2")).to_be_visible()
    expect(turns).to_have_count(2)

    turns.last.get_by_role("button", name="Edit").click()
    page.get_by_label("Your question").fill("or what?")
    page.get_by_role("button", name="Ask this instead").click()
    expect(turns.last.get_by_text("2 of 2")).to_be_visible()
    expect(turns.last.locator(".asked")).to_have_text("or what?")
    expect(turns).to_have_count(2)

    turns.first.get_by_role("button", name="Branch").click()
    expect(turns).to_have_count(1)
    ask(page, "a third way")
    expect(turns.last.get_by_text("3 of 3")).to_be_visible()


def test_an_answer_under_way_is_seen_by_all_survives_a_reload_and_can_be_stopped(
    visitor: Come, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(server.service, monkeypatch)
    stopped = threading.Event()
    stop = Speaking.stop
    monkeypatch.setattr(Speaking, "stop", lambda speaking: (stop(speaking), stopped.set()))
    me = visitor()
    page = me.open()
    page.get_by_label("Your message").fill(QUESTION)
    page.get_by_label("Your message").press("Enter")
    answer = page.locator('.answer[aria-busy="true"]')
    expect(answer).to_have_text(re.compile("..."))
    me.accessible()
    so_far = answer.inner_text()
    page.reload()
    expect(answer).to_have_text(so_far)
    other = visitor().open(page.url.removeprefix(server.address))
    expect(other.locator('.answer[aria-busy="true"]')).to_have_text(so_far)
    page.locator("body").press("Escape")
    assert stopped.wait(30)
    held.go.set()
    for each in (page, other):
        expect(each.locator("article[data-reply]")).to_have_count(1)
        expect(each.get_by_text("stopped")).to_be_visible()
        expect(each.locator('.answer[aria-busy="true"]')).to_have_count(0)


def test_an_answer_is_coloured_by_the_neurons_that_pushed_it(visitor: Come) -> None:
    me = visitor()
    turn = ask(me.open(), QUESTION)
    plain = turn.locator(".answer").first.inner_text()
    turn.get_by_role("button", name="Why").click()
    expect(turn.locator(".token").first).to_be_visible()
    assert "".join(turn.locator(".token").all_inner_texts()).split() == plain.split()
    turn.locator(".token").first.click()
    expect(turn.get_by_text("had a probability of")).to_be_visible()
    me.accessible()
    turn.get_by_role("button", name="Why").click()
    expect(turn.locator(".token")).to_have_count(0)
    expect(turn.locator(".answer").first).to_have_text(plain)


def test_the_keyboard_reaches_everything(visitor: Come) -> None:
    page = visitor().open()
    ask(page, QUESTION)
    page.locator("body").click(position={"x": 3, "y": 400})
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("/")
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type("?b")
    expect(page.get_by_label("Your message")).to_have_value("?b")
    page.get_by_label("Your message").fill("")
    page.locator("body").click(position={"x": 3, "y": 400})
    page.keyboard.press("k")
    expect(page.locator("article[data-reply]")).to_be_focused()
    page.keyboard.press("f")
    expect(page.get_by_label("What it should have said")).to_be_focused()
    page.get_by_role("button", name="Close").click()
    page.get_by_role("link", name="Health").focus()
    page.keyboard.press("2")
    expect(page.get_by_role("heading", name="Changes", level=1)).to_be_visible()


def test_the_changes_are_listed_filtered_and_two_versions_compared(visitor: Come, server: Served) -> None:
    live = server.service.live
    for question, wanted in ((QUESTION, "z"), (OTHER, "k")):
        live.fix(live.chat(question), wanted, keep_both=True, force=True)
    first, second = (change for change in live.changes() if change.state == "active")
    me = visitor()
    page = me.open("/changes")
    table = page.get_by_role("region", name="Table of changes")
    expect(table.get_by_role("button", name=f"Open {first.label}", exact=True)).to_be_visible()
    page.get_by_role("textbox", name="Find").fill(OTHER)
    expect(table.get_by_role("button", name=f"Open {first.label}", exact=True)).to_have_count(0)
    table.get_by_role("button", name=f"Open {second.label}", exact=True).click()
    chosen = page.get_by_role("region", name="The chosen change")
    expect(chosen.get_by_role("region", name="What else changed")).to_be_visible()
    me.accessible()
    chosen.get_by_role("button", name="Switch off").click()
    expect(chosen.get_by_role("button", name="Switch on")).to_be_visible()
    assert live.change(second).state == "off"
    page.reload()
    expect(chosen.get_by_role("button", name="Switch on")).to_be_visible()

    page.get_by_label("A question").fill(QUESTION)
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_role("region", name="as it is now")).to_contain_text("z")
    base = page.get_by_role("region", name="the base model, no change")
    assert not base.locator("p").inner_text().startswith("z")
    me.accessible()


def test_neurons_are_found_by_their_words_read_and_held(visitor: Come) -> None:
    me = visitor()
    page = me.open("/neurons")
    page.get_by_label("A word, such as river").fill("z")
    page.get_by_role("button", name="Search labels").click()
    found = page.get_by_role("region", name="Neurons found")
    name = found.get_by_role("link").first.inner_text()
    me.accessible()
    found.get_by_role("link").first.click()
    expect(page.get_by_role("heading", name=f"Neuron {name}")).to_be_visible()
    expect(page.get_by_text("Where it is strongest")).to_be_visible()
    page.get_by_label("A question").fill(QUESTION)
    page.get_by_role("button", name="Try").click()
    expect(page.get_by_role("region", name="With the neurons held")).to_be_visible()
    me.accessible()
    page.reload()
    expect(page.get_by_text("Where it is strongest")).to_be_visible()


def test_health_tells_what_was_measured(visitor: Come) -> None:
    me = visitor()
    page = me.open("/health")
    page.get_by_role("button", name="Measure now").click()
    expect(page.get_by_role("region", name="Compared with the base model")).to_contain_text("all answers stay")
    me.accessible()


def test_arena_results_of_the_workspace_are_shown(visitor: Come, server: Served) -> None:
    me = visitor()
    expect(me.open("/arena").get_by_text("There are no results")).to_be_visible()
    path = Path(server.service.settings.workspace) / "arena.json"
    scores = asdict(EditScores(1.0, 0.5, 0.9, 1.0, 0.5, 0.9, 1.0, 0.5, 0.9, 500.0))
    case = {"outcome": "made", "scores": scores, "seconds": 2.0, "undo_exact": True, "guard": {"passed": True}}
    run = {"data": "countries", "cases": 1, "mode": "single", "model": "tiny", "settings": {}}
    data = {"run": run, "machine": {}, "unedited": [{"scores": scores}], "methods": {"shout": [case]}}
    path.write_text(json.dumps(data), encoding="utf-8")
    try:
        page = me.open("/arena")
        expect(page.get_by_role("region", name="Results of arena.json")).to_contain_text("shout, under the guard")
        expect(page.locator(".plot .main-svg").first).to_be_visible()
        me.accessible()
    finally:
        path.unlink()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits_and_can_be_read(visitor: Come, server: Served, width: int, dark: bool) -> None:
    me = visitor(width=width, dark=dark)
    turn = ask(me.open(), QUESTION)
    fix(turn, "z")
    me.accessible()
    for path in ("/", "/changes", "/neurons", "/health", "/arena"):
        page = me.open(path)
        expect(page.get_by_text("v…")).to_have_count(0)
        me.accessible()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
