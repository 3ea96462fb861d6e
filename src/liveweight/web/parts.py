"""The small elements that every page is put together from.

Owns how a heading, a button, a table, an error and two texts side by side look and are read aloud. Knows no page and
nothing of models: texts and figures come in, elements come out.
"""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from nicegui import ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from liveweight.errors import LiveweightError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_ALIKE = 0.3  # below it two texts have too little in common for marks to help
Action = Callable[[], Awaitable[None] | None]


def tag(name: str, text: str = "", *classes: str, **attributes: Any) -> TextElement:
    """An HTML element with text, classes and attributes; `aria_label` becomes `aria-label`. Takes children."""
    made = TextElement(tag=name, text=text)
    if classes:
        made.classes(" ".join(classes))
    for attribute, value in attributes.items():
        if value is not None:
            made.props[attribute.rstrip("_").replace("_", "-")] = value
    return made


def button(text: str, action: Action, *classes: str, key: str = "", **attributes: Any) -> TextElement:
    """A button; `key` is its keyboard shortcut, which `page.js` presses it for."""
    made = tag("button", text, "button", *classes, type="button", **attributes)
    if key:
        made.props["data-key"] = key
        made.props["aria-keyshortcuts"] = key
    made.on("click", in_page(action), args=[])
    return made


def in_page(action: Action) -> Callable[[], Awaitable[None]]:
    """An action that goes on when the button that began it is gone: it acts in its page, not in the button's place."""
    client = ui.context.client

    async def run() -> None:
        with client:
            doing = action()
            if doing is not None:
                await doing

    return run


def enable(element: Element, enabled: bool) -> None:
    """Let a button be pressed, or not."""
    element.props.set_bool("disabled", not enabled)


def show(element: Element, shown: bool) -> None:
    """Let an element be seen and read, or not."""
    element.set_visibility(shown)


def pill(text: str, kind: str = "") -> TextElement:
    """A short word on a coloured ground; kinds are good, bad, warn and none."""
    return tag("span", text, "pill", kind)


def state_pill(state: str) -> TextElement:
    """The state of a change."""
    kinds = {"active": "good", "off": "warn", "refused": "bad", "failed": "bad"}
    return pill({"active": "on"}.get(state, state), kinds.get(state, ""))


def problem(error: LiveweightError | Mapping[str, Any] | Exception) -> None:
    """An error as its message and the way out."""
    if isinstance(error, LiveweightError):
        message, hint = error.message, error.hint
    elif isinstance(error, Mapping):
        message, hint = str(error.get("message", "That did not work.")), str(error.get("hint", ""))
    else:
        message, hint = "Something went wrong in the server.", "Its log says more."
    with tag("div", "", "problem", role="alert"):
        tag("p", message, "strong")
        if hint:
            tag("p", hint)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, numbers: Sequence[int] = ()
) -> TextElement:
    """A table of texts; the columns in `numbers` stand on the right. It scrolls sideways where there is no room."""
    with tag("div", "", "scroll", tabindex="0", role="region", aria_label=caption) as made, tag("table"):
        tag("caption", caption, "unseen")
        with tag("thead"), tag("tr"):
            for place, column in enumerate(columns):
                tag("th", column, "number" if place in numbers else "", scope="col")
        with tag("tbody"):
            for row in rows:
                with tag("tr"):
                    for place, cell in enumerate(row):
                        tag("td", cell, "number" if place in numbers else "")
    return made


def drawing(figure: Figure, about: str) -> None:
    """A plotly figure in the page's colours; `about` is read aloud for it."""
    shown = ui.plotly(figure).classes("plot")
    shown.props["role"], shown.props["aria-label"] = "figure", about


def side_by_side(left: tuple[str, str], right: tuple[str, str]) -> None:
    """Two titled texts beside each other, the words that differ marked in both."""
    texts = marked(left[1], right[1])
    with tag("div", "", "sides"):
        for (title, _), shown in zip((left, right), texts, strict=True):
            with tag("section", "", "side", aria_label=title):
                tag("h3", title, "minor")
                ui.html(shown or "<em>nothing</em>", sanitize=False, tag="p").classes("said")


def marked(before: str, after: str) -> tuple[str, str]:
    """Both texts as HTML, escaped, with `del` around what goes and `ins` around what comes, where they are alike."""
    if difflib.SequenceMatcher(a=before.split(), b=after.split(), autojunk=False).ratio() < _ALIKE:
        return html.escape(before), html.escape(after)
    old, new = re.findall(r"\s+|[^\s]+", before), re.findall(r"\s+|[^\s]+", after)
    first, second = [], []
    for what, a, b, c, d in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
        gone, come = html.escape("".join(old[a:b])), html.escape("".join(new[c:d]))
        first.append(gone if what == "equal" or not gone.strip() else f"<del>{gone}</del>")
        second.append(come if what == "equal" or not come.strip() else f"<ins>{come}</ins>")
    return "".join(first), "".join(second)


def ago(moment: datetime | None) -> str:
    """How long ago something was, in words."""
    if moment is None:
        return ""
    then = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    seconds = (datetime.now(UTC) - then).total_seconds()
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' * (count > 1)} ago"
    return "just now"


def when(moment: datetime | None) -> str:
    """A moment as a date and a time, UTC."""
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M}"


def tell(text: str, kind: str = "positive") -> None:
    """A short notice that goes away again; it is read aloud."""
    ui.notify(text, type=kind, position="top", timeout=3000)  # type: ignore[arg-type] # one of Quasar's names


def counted(count: int, one: str, many: str = "") -> str:
    """`3 answers`, `1 answer`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


async def aside(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run what blocks in a worker thread, with this task's context."""
    return await anyio.to_thread.run_sync(lambda: function(*arguments), abandon_on_cancel=True)


def when_written(path: Path) -> str:
    """When a file was written, UTC."""
    return when(datetime.fromtimestamp(path.stat().st_mtime, UTC))
