"""`liveweight undo`, `off`, `on`, `strength` and `fold`: what can be done with a change that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options

if TYPE_CHECKING:
    from liveweight.live_model import LiveModel
    from liveweight.reports import Change

Id = Annotated[str, typer.Argument(metavar="ID", help="Such as c3.")]


@takes_options
def undo(
    options: Options,
    change: Annotated[
        str | None,
        typer.Argument(metavar="[ID]", help="Such as c3, or p3 for a protected answer; else the newest change."),
    ] = None,
) -> None:
    """Take a change back for good. The weights are then bit for bit what they would be without it."""
    with session.opened(options) as live:
        _told(options, live, live.undo(change))


@takes_options
def off(options: Options, change: Id) -> None:
    """Switch a change off; `on` brings it back."""
    with session.opened(options) as live:
        _told(options, live, live.off(change))


@takes_options
def on(
    options: Options,
    change: Id,
    keep_both: Annotated[bool, typer.Option("--keep-both", help="Even beside a change that contradicts it.")] = False,
) -> None:
    """Switch a change on again."""
    with session.opened(options) as live:
        _told(options, live, live.on(change, keep_both=keep_both))


@takes_options
def strength(
    options: Options,
    change: Id,
    value: Annotated[float, typer.Argument(help="1 is as proposed, 0 is off, 0.5 half.")],
) -> None:
    """Weaken or amplify a change."""
    with session.opened(options) as live:
        _told(options, live, live.set_strength(change, value))


@takes_options
def fold(options: Options, change: Id) -> None:
    """Say a change that acts while the model runs (gains, a constant steering) in the weights; undo brings it back."""
    with session.opened(options) as live:
        output.print_change(live.fold(change), as_json=options.json)


def _told(options: Options, live: LiveModel, change: Change) -> None:
    if options.json:
        output.print_json({**change.as_dict(), "version": str(live.engine.version)})
        return
    said = Text.assemble((change.label, "bold"), " ", change.state_text())
    said.append(f" at strength {change.strength:g}: {change.question}")
    output.out().print(said)
