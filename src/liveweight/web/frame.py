"""What every page has around it: navigation, theme, shortcuts, and hearing of what happens.

Owns the layout, the check of a visitor's rights before anything is changed, and the timer by which an open page learns
that it has to read anew. Knows nothing of what a page shows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request
from nicegui import ui

from liveweight.errors import LiveweightError
from liveweight.web.parts import aside, button, counted, tag, tell
from liveweight.web.visitors import Visitor, Visitors

if TYPE_CHECKING:
    from liveweight.server.service import Service
    from liveweight.web.board import Board

PAGES = (("Chat", "/"), ("Changes", "/changes"), ("Neurons", "/neurons"), ("Health", "/health"), ("Arena", "/arena"))
_POLL = 0.25  # seconds between two looks at the board
_FILES = Path(__file__).parent
_KEYS = (
    ("?", "this list"),
    ("1 … 5", "Chat, Changes, Neurons, Health, Arena"),
    ("/", "go to the field to type in"),
    ("Enter", "send; Shift+Enter begins a new line"),
    ("Esc", "stop the answer that is being given"),
    ("j, k", "next and previous answer"),
    ("g", "the answer is good"),
    ("b", "the answer is bad"),
    ("f", "fix the answer"),
    ("e", "edit the question"),
    ("r", "answer again"),
    ("n", "colour the answer by its neurons"),
    ("t", "light or dark"),
)


class Frame:
    """One open page in one browser."""

    def __init__(self, board: Board, visitors: Visitors, visitor: Visitor, request: Request, here: str) -> None:
        """Draw what is around the page; `here` is the page's name in the navigation."""
        self.board, self.visitors, self.visitor = board, visitors, visitor
        self._seen = -1
        self._read: Callable[[], Awaitable[None]] | None = None
        theme = request.cookies.get("liveweight-theme")
        self._dark = ui.dark_mode({"dark": True, "light": False}.get(theme or ""))
        ui.page_title(f"{here} · liveweight")
        ui.colors(primary="#17627a", positive="#1b6a38", negative="#a3262b", warning="#7d5200", info="#17627a")
        ui.add_css((_FILES / "page.css").read_text(encoding="utf-8"))
        ui.add_body_html(f"<script>{(_FILES / 'page.js').read_text(encoding='utf-8')}</script>")
        self._content = ui.context.client.content
        # Until the browser is connected nothing would come of what is typed or pressed, so nothing can be.
        self._content.props["inert"], self._content.props["aria-busy"] = True, "true"
        ui.skip_link("Skip to the content", target=self._content)
        self._head(here)

    @property
    def service(self) -> Service:
        """The model and everything around it."""
        return self.board.service

    @property
    def may_change(self) -> bool:
        """Whether this visitor may judge and change, as far as was known when the page was opened."""
        return self.visitor.may_change

    @property
    def neurons(self) -> int:
        """How many neurons a layer of the model came with."""
        return self.service.live.engine.info.neurons

    @property
    def tab(self) -> str:
        """Which tab of which browser this is; the same after a reload."""
        return ui.context.client.tab_id or ui.context.client.id

    def watch(self, read: Callable[[], Awaitable[None]]) -> None:
        """Call `read` when anything has happened, and once at the start."""
        self._read = read
        ui.timer(_POLL, self._look, immediate=True)

    async def act(self, verb: Callable[..., Any], *arguments: Any) -> Any:
        """Carry out a verb that changes something, in the visitor's name; what goes wrong is shown.

        Gives what the verb gives, None where it raised or the visitor may not.
        """
        author = await self.allowed()
        if author is None:
            return None
        try:
            return await aside(self.board.change, author, verb, *arguments)
        except LiveweightError as error:
            tell(f"{error.message} {error.hint}".strip(), "negative")
            return None

    async def allowed(self) -> str | None:
        """The name to write into the ledger, or None, said aloud, where this visitor may not change anything now."""
        visitor = await aside(self.visitors.again, self.visitor.key)
        if visitor is None:
            tell("Your key is not good any more. Sign in again.", "negative")
            return None
        if not visitor.may_change:
            tell("Your key may chat and look. Changing the model takes an editor key.", "negative")
            return None
        return str(visitor.author)

    async def known(self) -> bool:
        """Whether this visitor may still look and chat; said aloud where not."""
        visitor = await aside(self.visitors.again, self.visitor.key)
        if visitor is None:
            tell("Your key is not good any more. Sign in again.", "negative")
        return visitor is not None

    async def _look(self) -> None:
        number = self.board.number
        if number == self._seen or ui.context.client.is_deleted:
            return
        self._seen = number
        state = await aside(self._state)
        if state is None:
            ui.navigate.to("/login")
            return
        version, active = state
        self._version.text = version
        self._active.text = counted(active, "change on", "changes on")
        if self._read is not None:
            await self._read()
        for name in ("inert", "aria-busy"):
            self._content.props.pop(name, None)

    def _state(self) -> tuple[str, int] | None:
        """The version and how many changes are on; None where the visitor's key is good no more."""
        if self.visitors.again(self.visitor.key) is None:
            return None
        engine = self.service.live.engine
        return f"v{engine.version.number}", len(engine.state)

    def _head(self, here: str) -> None:
        with ui.header(elevated=False).classes("top"):
            tag("a", "liveweight", "brand", href="/")
            with tag("nav", "", aria_label="Pages"):
                for number, (name, address) in enumerate(PAGES, start=1):
                    link = tag("a", name, href=address, data_key=str(number))
                    if name == here:
                        link.props["aria-current"] = "page"
            with tag("div", "", "end"):
                with tag("a", "", "pill", href="/changes", title="The version of the weights, and the changes in it"):
                    self._version = tag("span", "v…")
                    tag("span", " · ")
                    self._active = tag("span", "")
                button("Theme", self._toggle, "quiet", key="t", title="Light or dark")
                button("?", self._shortcuts().open, "quiet", key="?", aria_label="Keyboard shortcuts")
                if self.visitor.name:
                    with tag("form", "", method="post", action="/logout"):
                        tag(
                            "button",
                            "Sign out",
                            "button",
                            "quiet",
                            type="submit",
                            title=f"Signed in: {self.visitor.name}",
                        )

    async def _toggle(self) -> None:
        dark = self._dark.value
        if dark is None:
            dark = bool(await ui.run_javascript("document.body.classList.contains('body--dark')", timeout=5.0))
        self._dark.value = not dark
        ui.run_javascript(f"liveweight.theme('{'light' if dark else 'dark'}')")

    def _shortcuts(self) -> ui.dialog:
        dialog = ui.dialog().props('aria-label="Keyboard shortcuts"')
        with dialog, tag("div", "", "panel", "stack"):
            tag("h2", "Keyboard shortcuts")
            with tag("table", "", "plain"), tag("tbody"):
                for key, does in _KEYS:
                    with tag("tr"):
                        with tag("th", "", scope="row"):
                            tag("kbd", key)
                        tag("td", does)
            with tag("label", "", "row"):
                tag("input", "", type="checkbox", data_keys="on")
                tag("span", "Single keys are shortcuts")
            tag("p", "Keys for an answer mean the one that has the focus, else the last one.", "dim", "small")
            with tag("div", "", "row", "end"):
                button("Close", dialog.close)
        dialog.on_value_change(
            lambda event: ui.run_javascript("setTimeout(liveweight.showKeys, 50)") if event.value else None
        )
        return dialog
