"""One turn of a conversation: what was asked, what was answered, and what can be done with the answer.

Owns the elements of a turn that is over, and of the one that is being answered. What a button does to the conversation
is the chat page's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nicegui import ui

from liveweight.errors import LiveweightError
from liveweight.reports import Reply
from liveweight.web.coloured_answer import ColouredAnswer
from liveweight.web.frame import Frame
from liveweight.web.judgement_card import JudgementCard
from liveweight.web.parts import ago, button, problem, tag, tell
from liveweight.web.story import Judged
from liveweight.web.talking import Speaking

ENDINGS = {"length": "cut off at its longest", "cancelled": "stopped"}


@dataclass(frozen=True)
class Doings:
    """What a turn asks the conversation for."""

    ask_again: Callable[[Reply], Awaitable[None]]
    ask_otherwise: Callable[[Reply, str], Awaitable[None]]
    branch: Callable[[Reply], None]
    show_sibling: Callable[[int], None]
    changed: Callable[[], None]


class Turn:
    """A question and the reply to it, which is in the ledger."""

    def __init__(self, frame: Frame, reply: Reply, doings: Doings) -> None:
        """Draw it in the present slot."""
        self._frame, self.reply, self._doings = frame, reply, doings
        self._siblings: list[int] = []
        self._coloured: ColouredAnswer | None = None
        self.box = tag("article", "", "turn", tabindex="-1", aria_label=f"Answer {reply.label}", data_reply=reply.label)
        with self.box:
            self._asked = tag("div", "", "asked-box", "stack")
            with self._asked:
                self._draw_question()
            tag("h3", "The model answered", "unseen")
            self._answer = tag("div", reply.text or "(nothing)", "answer")
            self._colours = tag("div", "", "stack")
            self._actions()
            self.card = JudgementCard(frame, reply, doings.changed, self._ask_again)

    def update(self, judged: Judged, siblings: list[int]) -> None:
        """Show what became of the feedback, and how many other answers there are."""
        taken_back = judged.verdict == "good" and judged.protected is None and judged.change is None
        said = "" if taken_back else judged.verdict
        for element, verdict in ((self._good, "good"), (self._bad, "bad"), (self._fix, "fix")):
            element.props["aria-pressed"] = str(said == verdict).lower()
        if siblings != self._siblings:
            self._siblings = siblings
            self._draw_siblings()
        self.card.update(judged)

    def _draw_question(self) -> None:
        tag("h2", "You asked", "unseen")
        tag("div", self.reply.question, "asked")

    def _actions(self) -> None:
        frame, reply = self._frame, self.reply
        with tag("div", "", "actions", role="group", aria_label=f"What to do with answer {reply.label}"):
            self._good = button(
                "Good", self.card_good, "quiet", key="g", title="Protect this answer", aria_pressed="false"
            )
            self._bad = button("Bad", self.card_open, "quiet", key="b", title="Say what is wrong", aria_pressed="false")
            self._fix = button(
                "Fix", self.card_fix, "quiet", key="f", title="Write a better answer", aria_pressed="false"
            )
            if not frame.may_change:
                for each in (self._good, self._bad, self._fix):
                    each.props["disabled"] = True
                    each.props["title"] = "Takes an editor key"
            self._why = button("Why", self._colour, "quiet", key="n", title="Colour by neurons", aria_pressed="false")
            button("Again", self._ask_again, "quiet", key="r", title="Answer again")
            button("Edit", self._edit, "quiet", key="e", title="Ask otherwise: another branch")
            button("Branch", lambda: self._doings.branch(reply), "quiet", title="Go on from here, leaving what follows")
            self._pager = tag("span", "", "row")
            ending = ENDINGS.get(reply.finish, "")
            version = ", ".join(each.split(":")[0] for each in reply.versions) or f"v{reply.version_number}"
            told = [reply.label, version, ago(reply.created_at), ending]
            tag("span", " · ".join(each for each in told if each), "dim", "small")

    def _draw_siblings(self) -> None:
        self._pager.clear()
        if len(self._siblings) < 2:
            return
        at = self._siblings.index(self.reply.id)
        with self._pager:
            earlier = button(
                "←", lambda: self._doings.show_sibling(self._siblings[at - 1]), "quiet", aria_label="Earlier answer"
            )
            tag("span", f"{at + 1} of {len(self._siblings)}", "dim", "small")
            later = button(
                "→", lambda: self._doings.show_sibling(self._siblings[at + 1]), "quiet", aria_label="Later answer"
            )
        earlier.props.set_bool("disabled", at == 0)
        later.props.set_bool("disabled", at == len(self._siblings) - 1)

    async def card_good(self) -> None:
        """One click says that the answer is good."""
        await self.card.good()

    def card_open(self) -> None:
        """Open the card to say what is wrong."""
        self.card.open()

    def card_fix(self) -> None:
        """Open the card to write a better answer."""
        self.card.open(correct=True)

    async def _ask_again(self) -> None:
        await self._doings.ask_again(self.reply)

    def _edit(self) -> None:
        self._asked.clear()
        with self._asked:
            text = ui.textarea("Your question", value=self.reply.question).props("outlined autogrow")
            with tag("div", "", "row", "end"):

                async def send() -> None:
                    wanted = str(text.value or "").strip()
                    self._close_edit()
                    if wanted:
                        await self._doings.ask_otherwise(self.reply, wanted)

                button("Ask this instead", send, "primary")
                button("Cancel", self._close_edit)
        ui.run_javascript(f"liveweight.focus('#c{self._asked.id} textarea')")

    def _close_edit(self) -> None:
        self._asked.clear()
        with self._asked:
            self._draw_question()

    async def _colour(self) -> None:
        if self._coloured is not None:
            self._coloured = None
            self._colours.clear()
            self._answer.set_visibility(True)
            self._why.props["aria-pressed"] = "false"
            return
        self._why.props["aria-pressed"] = "true"
        with self._colours:
            waiting = tag("p", "Reading which neurons pushed it…", "dim", "small", role="status")
            self._coloured = ColouredAnswer(self._frame, self.reply)
        try:
            await self._coloured.read()
            self._answer.set_visibility(False)
            waiting.delete()
        except LiveweightError as error:
            self._coloured = None
            self._colours.clear()
            self._why.props["aria-pressed"] = "false"
            tell(f"{error.message} {error.hint}".strip(), "negative")


class SpeakingTurn:
    """A question whose reply is being said."""

    def __init__(self, speaking: Speaking, stop: Callable[[], None]) -> None:
        """Draw it in the present slot."""
        self.speaking = speaking
        self.box = tag("article", "", "turn", tabindex="-1", aria_label="Answer under way")
        with self.box:
            tag("h2", "You asked", "unseen")
            tag("div", speaking.question, "asked")
            self._answer = tag("div", speaking.text, "answer", aria_busy="true")
            self._actions = tag("div", "", "row")
            with self._actions:
                button("Stop", stop, key="Escape")
            self._failed = False

    def update(self) -> None:
        """Show what was said since."""
        text = self.speaking.text
        if self._answer.text != text:
            self._answer.text = text
        if self.speaking.over and self.speaking.error is not None and not self._failed:
            self._failed = True
            self._answer.props["aria-busy"] = "false"
            self._actions.clear()
            with self._actions:
                problem(self.speaking.error)
