"""`liveweight learn`: many records of feedback at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_method_settings, takes_options
from liveweight.errors import GuardRefused
from liveweight.shown import table

if TYPE_CHECKING:
    from liveweight.learning import Lessons

_COLOURS = {"learnt": "green", "already": "dim", "protected": "green", "preview": "cyan"}


@takes_options
@takes_method_settings
def learn(
    options: Options,
    feedback: Annotated[Path, typer.Argument(help="JSON Lines: prompt, answer, rating, correction.")],
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="A change for each, instead of a joint one.")
    ] = False,
    method: Annotated[str | None, typer.Option(help="Which method proposes.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Measure and commit nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Commit over the guard's budget.")] = False,
) -> None:
    """Learn from a file of feedback. Run it again to go on: what is right already is left alone.

    Exits with 3 where the guard refused some of it, else with 1 where some of it failed.
    """
    from liveweight.lessons import read_lessons

    records = read_lessons(feedback)
    with session.opened(options) as live, output.bar(quiet=options.json) as bar:
        task = bar.add_task("", total=len(records))

        def progress(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        found = live.learn(
            records, joint=not one_by_one, method=method, preview=preview, force=force, progress=progress
        )
    if options.json:
        output.print_json(found.model_dump(mode="json"))
    else:
        _shown(found)
    if found.count("refused"):
        raise typer.Exit(GuardRefused.exit_code)
    if found.count("failed") or found.count("error"):
        raise typer.Exit(1)


def _shown(found: Lessons) -> None:
    outcomes = list(dict.fromkeys(item.outcome for item in found.items))
    output.out().print(", ".join(f"{found.count(outcome)} {outcome}" for outcome in outcomes))
    shown = table("line>", "question", "wanted", "", "change", "why")
    for item in found.items:
        shown.add_row(
            str(item.number),
            Text(item.prompt),
            Text(item.wanted or ""),
            Text(item.outcome, style=_COLOURS.get(item.outcome, "red")),
            item.change or "",
            Text(item.why),
        )
    output.out().print(shown)
    spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in found.seconds.items())
    output.out().print(Text(f"seconds: {sum(found.seconds.values()):.1f} ({spent})", "dim"))
