"""How results look: tables on a terminal, the same as HTML in a notebook.

Owns the house's look, made for 80 columns, and the mixin that gives a result both views. Knows no result.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_WIDTH = 100  # characters of a notebook's view


class Shown:
    """A result that shows itself: `print` it with rich, or let a notebook show it. What it is made of is `__rich__`."""

    def __rich__(self) -> RenderableType:
        """The result as text and tables."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        """The same for a notebook, which otherwise would show every field."""
        return {"text/plain": self._recorded().export_text(), "text/html": self._repr_html_()}

    def _repr_html_(self) -> str:
        form = '<pre style="font-family: monospace; line-height: 1.3; white-space: pre">{code}</pre>'
        return self._recorded().export_html(inline_styles=True, code_format=form)

    def _recorded(self) -> Console:
        from rich.console import Console

        # Not a notebook's own console: that one shows what it prints beside what is returned here.
        console = Console(file=io.StringIO(), record=True, width=_WIDTH, color_system="truecolor", force_jupyter=False)
        console.print(self)
        return console


def table(*columns: str, title: str | Text | None = None) -> Table:
    """An empty table in the house's look; a column whose name ends in > stands on the right."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, expand=False)
    for column in columns:
        right = column.endswith(">")
        made.add_column(column.removesuffix(">"), justify="right" if right else "left", overflow="fold")
    return made


def grid(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    """Names on the left, values on the right."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, value)
    return made


def quoted(text: str) -> Text:
    """A token's text with its spaces and line ends visible, never taken as markup."""
    return Text(repr(text)[1:-1])


def short(text: str, most: int) -> str:
    """One line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
