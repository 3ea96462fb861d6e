"""What is shown: results on stdout, progress and errors on stderr, as text for people or JSON for programs.

Owns consoles, bars and lists; a result itself says how it looks. Knows nothing of how results come about.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from liveweight.shown import short, table

if TYPE_CHECKING:
    from liveweight.errors import LiveweightError
    from liveweight.ledger import ProtectedAnswer
    from liveweight.reports import Change


def out() -> Console:
    """The console of results. Made when used, so that a redirected stdout is found."""
    return Console(file=sys.stdout, highlight=False)


def progress() -> Console:
    """The console of progress and errors."""
    return Console(file=sys.stderr, highlight=False)


def bar(*, quiet: bool) -> Progress:
    """A bar of longer work on stderr with the time left; none where a program reads, or where stderr is a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = progress()
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def counted(shown: Progress, what: str, *, visible: bool = True) -> Callable[[int, int], None]:
    """What moves a new line of a bar: called with what is done, and of how many."""
    task = shown.add_task(what, total=None, visible=visible)

    def move(done: int, of: int) -> None:
        shown.update(task, completed=done, total=of)

    return move


def phases(shown: Progress) -> Callable[[str, int, int], None]:
    """The same for work of several parts, each a line of its own from its first call on: called with its name, too."""
    tasks: dict[str, TaskID] = {}

    def move(what: str, done: int, of: int) -> None:
        if what not in tasks:
            tasks[what] = shown.add_task(what)
        shown.update(tasks[what], completed=done, total=of)

    return move


def draw(found: Any, path: Path) -> list[str]:
    """Write the picture of a result that has one, and say where; the files."""
    from liveweight import pictures

    written = [str(each) for each in pictures.save(found.picture(), path)]
    say(f"drawn: {', '.join(written)}")
    return written


def _json(value: Any, indent: int | None = None) -> str:
    """As JSON; numbers that it lacks become "NaN", "Infinity" and "-Infinity", as in the ledger."""
    known = json.loads(json.dumps(value, default=str), parse_constant=str)
    return json.dumps(known, ensure_ascii=False, indent=indent)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(_json(value, indent=2), flush=True)


def print_json_line(value: Any) -> None:
    """The same on a line of its own, as programs read one after the other."""
    print(_json(value), flush=True)


def print_report(found: Any, *, as_json: bool, picture: Path | None = None, **more: Any) -> None:
    """A result that shows itself, or its JSON with what there is `more`; drawn, too, where `picture` says where."""
    if not as_json:
        out().print(found)
    if picture is not None:
        more["pictures"] = draw(found, picture)
    if as_json:
        print_json(found.model_dump(mode="json") | more)


def say(sentence: str) -> None:
    """One step of longer work."""
    progress().print(Text(f"· {sentence}", style="dim"), soft_wrap=True)  # an address in it stays whole


def print_error(error: LiveweightError, *, as_json: bool) -> None:
    """What went wrong and the way out."""
    if as_json:
        print(_json(error.as_dict()), file=sys.stderr)
        return
    console = progress()
    console.print(Text(error.message, style="bold red"))
    if error.hint:
        console.print(Text(error.hint))


def print_change(change: Change, *, as_json: bool) -> None:
    """A change with its whole report."""
    if as_json:
        print_json(change.as_dict())
        return
    out().print(change)


def changes_view(changes: Sequence[Change]) -> RenderableType:
    """All changes, one a line."""
    if not changes:
        return Text("No changes yet.")
    shown = table("id", "state", "strength>", "method", "question", "wanted")
    for change in changes:
        wanted = change.wanted or {"bad": "(not that)", "good": "(keep)"}.get(change.verdict, "")
        state = change.state_text()
        if change.replaced_by:
            state.append(f" by {change.replaced_by}", style="dim")
        shown.add_row(
            Text(change.label, "bold"),
            state,
            f"{change.strength:g}",
            change.method or "",
            Text(short(change.question, 36)),
            Text(short(wanted, 18)),
        )
    return shown


def protected_view(answers: Sequence[ProtectedAnswer]) -> RenderableType:
    """All protected answers, one a line."""
    if not answers:
        return Text("No answer is protected.")
    shown = table("id", "question", "answer", "came with")
    for each in answers:
        question, answer = Text(short(each.question, 36)), Text(short(each.answer, 36))
        shown.add_row(Text(each.label, "bold"), question, answer, "" if each.change is None else f"c{each.change}")
    return shown
