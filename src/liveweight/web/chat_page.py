"""The chat: conversations, their branches, and asking.

Owns which conversation and which branch of it an open page shows (its address says it: `/?chat=NAME&at=r12`), and
keeping the turns on the page equal to what the ledger says. A turn is found by its reply's id, never by its place.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nicegui import ui

from liveweight.engines.base import Message
from liveweight.errors import InvalidInput, LiveweightError
from liveweight.ledger import Conversation, parse_id
from liveweight.reports import Reply
from liveweight.shown import short
from liveweight.web import story
from liveweight.web.frame import Frame
from liveweight.web.parts import aside, button, tag, tell
from liveweight.web.story import Judged, Tree
from liveweight.web.talking import Speaking
from liveweight.web.turn import Doings, SpeakingTurn, Turn

_POLL = 0.1  # seconds between two looks at a reply under way
_TITLE = 60
_BEGINNINGS = (
    "What is the capital of Vietnam?",
    "Explain in two sentences how a bicycle stays upright.",
    "Write a haiku about rain.",
)


@dataclass(frozen=True)
class _Seen:
    """What the ledger says of the conversation."""

    tree: Tree
    judged: dict[int, Judged]
    chats: list[Conversation]


class ChatPage:
    """One open chat page."""

    def __init__(self, frame: Frame, chat: str | None, at: str | None) -> None:
        """Draw it, and follow what happens."""
        self._frame, self._chat = frame, chat
        self._at = _number(at)
        self._exact = self._at is not None  # the address names the branch; else it is the newest
        self._turns: dict[int, Turn] = {}
        self._tree = Tree()
        self._speaking: SpeakingTurn | None = None
        with tag("div", "", "talk"):
            self._list = tag("nav", "", "list", "closed", aria_label="Conversations")
            with tag("div", "", "main"):
                with tag("div", "", "row", "between"):
                    tag("h1", "Chat", "unseen")
                    button("Conversations", self._fold_list, "quiet", "only-narrow")
                self._empty = tag("div", "", "empty")
                self._column = tag("div", "", "turns", role="region", aria_label="Conversation")
                self._said = tag("p", "", "unseen", role="status")
                self._composer()
        self._draw_empty()
        frame.watch(self._read)
        ui.timer(_POLL, self._follow)

    # ------------------------------------------------------------------------------------------------- what is shown

    def _draw_empty(self) -> None:
        name = Path(self._frame.service.live.engine.info.name).name
        with self._empty:
            tag("h2", f"Talk to {name}")
            tag(
                "p",
                "It answers. Say under an answer whether it was good or bad, and it learns from that at once.",
                "dim",
            )
            with tag("div", "", "row"):
                for text in _BEGINNINGS:
                    button(text, partial(self._begin_with, text))
        self._empty.set_visibility(self._chat is None)

    async def _begin_with(self, text: str) -> None:
        await self._ask(text)

    def _composer(self) -> None:
        with tag("div", "", "composer"):
            self._input = ui.textarea(label="Your message").props('outlined autogrow dense data-first="1"')
            self._input.on(
                "keydown",
                self._send,
                args=[],
                js_handler="(e) => { if (e.key === 'Enter' && !e.shiftKey && !e.isComposing)"
                " { e.preventDefault(); emit(); } }",
            )
            button("Send", self._send, "primary")

    def _fold_list(self) -> None:
        self._list.classes(toggle="closed")

    async def _read(self) -> None:
        """Make the page equal to the ledger."""
        seen = await aside(self._seen)
        self._tree = seen.tree
        self._draw_list(seen.chats)
        self._choose(seen.tree)
        path = seen.tree.path(self._at)
        self._keep({reply.id for reply in path})
        for reply in path:
            if reply.id not in self._turns:
                with self._column:
                    self._turns[reply.id] = Turn(self._frame, reply, self._doings())
            self._turns[reply.id].update(seen.judged.get(reply.id, Judged()), seen.tree.siblings(reply.id))
        self._follow()

    def _choose(self, tree: Tree) -> None:
        """Which reply is the last that is shown."""
        running = None if self._speaking is None else self._speaking.speaking
        if running is not None:
            self._at = running.reply.id if running.reply is not None else running.after
        elif self._at not in tree.replies:
            self._at = tree.newest
        elif not self._exact and self._at is not None:
            self._at = tree.end(self._at)

    def _keep(self, replies: set[int]) -> None:
        """Take the other turns away."""
        for number in [number for number in self._turns if number not in replies]:
            self._turns.pop(number).box.delete()

    def _seen(self) -> _Seen:
        board = self._frame.board
        tree = Tree() if self._chat is None else story.tree(board.service, self._chat)
        return _Seen(tree, story.judged(board, list(tree.replies.values())), story.chats(board.service))

    def _draw_list(self, chats: Sequence[Conversation]) -> None:
        self._list.clear()
        with self._list:
            tag("a", "New conversation", "strong", href="/")
            for each in chats:
                link = tag("a", short(each.title, _TITLE), href=f"/?chat={each.id}", title=short(each.title, 300))
                if each.id == self._chat:
                    link.props["aria-current"] = "page"

    def _follow(self) -> None:
        """Show what is being said just now in this conversation."""
        for turn in self._turns.values():
            turn.card.tick()
        running = self._frame.board.talk.of(self._chat)
        if running is not None and self._concerns(running):
            self._begin(running)
        if self._speaking is None:
            return
        speaking = self._speaking.speaking
        speaking.look()
        self._speaking.update()
        if not speaking.over or speaking.error is not None:
            return
        reply = speaking.reply
        if reply is not None and reply.id not in self._tree.replies:
            return  # it is read from the ledger with the next look
        self._speaking.box.delete()
        self._speaking = None
        if reply is not None:
            self._said.text = f"The model answered: {reply.text}"

    def _concerns(self, running: Speaking) -> bool:
        """Whether a reply that somebody has begun goes on from what is shown here, and is not shown yet."""
        if self._speaking is not None and self._speaking.speaking is running:
            return False
        return running.after in self._turns or (running.after is None and not self._exact)

    def _begin(self, speaking: Speaking) -> None:
        if self._speaking is not None:
            self._speaking.box.delete()
        with self._column:
            self._speaking = SpeakingTurn(speaking, speaking.stop)
        self._said.text = "The model is answering."
        self._empty.set_visibility(False)
        self._keep({reply.id for reply in self._tree.path(speaking.after)})
        self._exact = False  # the branch that is shown grows

    # ------------------------------------------------------------------------------------------------- what is done

    def _doings(self) -> Doings:
        return Doings(self._again, self._otherwise, self._branch, self._sibling, self._frame.board.bump)

    async def _send(self) -> None:
        text = str(self._input.value or "").strip()
        if text and await self._ask(text):
            self._input.value = ""

    async def _ask(self, text: str) -> bool:
        """Go on with the branch that is shown."""
        last = None if self._at is None else self._tree.replies.get(self._at)
        before = () if last is None else tuple(Message(turn.role, turn.content) for turn in last.history)
        return await self._say((*before, Message("user", text)), last)

    async def _again(self, reply: Reply) -> None:
        await self._say(reply.prompt, self._tree.replies.get(reply.after or 0), fresh=True)

    async def _otherwise(self, reply: Reply, text: str) -> None:
        await self._say((*reply.prompt[:-1], Message("user", text)), self._tree.replies.get(reply.after or 0))

    async def _say(self, messages: tuple[Message, ...], after: Reply | None, *, fresh: bool = False) -> bool:
        """Begin a reply; `fresh` draws it at random where the settings would give the same one again."""
        if not await self._frame.known():
            return False
        if self._frame.board.talk.of(self._chat) is not None:
            tell("The model is still answering. Stop it first.", "warning")
            return False
        if self._chat is None:
            self._chat = secrets.token_hex(8)
        live = self._frame.service.live
        sampling = live.sampling()
        if fresh and sampling.temperature == 0.0 and await aside(self._same_version, after, messages):
            sampling = live.sampling(temperature=0.7, top_p=0.95)
        author = self._frame.visitor.author
        try:
            speaking = self._frame.board.talk.say(messages, sampling, chat=self._chat, after=after, author=author)
        except LiveweightError as error:
            tell(f"{error.message} {error.hint}".strip(), "negative")
            return False
        if speaking is not (None if self._speaking is None else self._speaking.speaking):
            self._begin(speaking)
        self._address()
        return True

    def _same_version(self, after: Reply | None, messages: tuple[Message, ...]) -> bool:
        """Whether the weights as they are have answered this already: greedily they would say the same again."""
        now = self._frame.service.live.engine.version.hash
        return any(
            reply.version_hash == now and reply.prompt == messages and not reply.sampling.get("temperature")
            for reply in self._tree.replies.values()
        )

    def _branch(self, reply: Reply) -> None:
        self._show(reply.id)
        ui.run_javascript("liveweight.focus('.composer textarea')")
        tell("Your next message goes on from here. What followed is kept.", "info")

    def _sibling(self, reply: int) -> None:
        self._show(self._tree.end(reply))

    def _show(self, reply: int) -> None:
        self._at, self._exact = reply, True
        self._address()
        self._frame.board.bump()

    def _address(self) -> None:
        at = f"&at=r{self._at}" if self._exact and self._at is not None else ""
        ui.navigate.history.replace(f"/?chat={self._chat}{at}" if self._chat else "/")


def _number(at: str | None) -> int | None:
    """The reply that an address names, None where it names none."""
    if not at:
        return None
    try:
        return parse_id(at, "r")
    except InvalidInput:
        return None
