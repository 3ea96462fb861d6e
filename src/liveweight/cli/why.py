"""`liveweight why`: the neurons behind an answer."""

from __future__ import annotations

from typing import Annotated

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options


@takes_options
def why(
    options: Options,
    question: Annotated[str | None, typer.Argument(help="Ask this now; else the last reply.")] = None,
    reply: Annotated[str | None, typer.Option("--reply", "-r", help="An earlier reply by its id.")] = None,
    against: Annotated[str | None, typer.Option(help="Compare with this answer; else each token's runner-up.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Neurons on each side.")] = 20,
) -> None:
    """Show the neurons that pushed an answer most, and those that pushed against it."""
    with session.opened(options) as live:
        judged = session.meant(live, reply, question)
        found = live.why(judged, against=against, top=top)
        if options.json:
            output.print_json({"reply": judged.label, **found.model_dump(mode="json")})
        else:
            output.out().print(found)
