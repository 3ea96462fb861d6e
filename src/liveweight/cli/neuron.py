"""`liveweight neuron`: one neuron's page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options


@takes_options
def neuron(
    options: Options,
    which: Annotated[str, typer.Argument(metavar="LAYER:NEURON", help="Such as 20:1114.")],
    text: Annotated[Path | None, typer.Option(help="Read this text file; else the text that ships.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How much of it is read.")] = 8192,
    picture: Annotated[Path | None, typer.Option(help="Draw the clamp curve: PATH.html and PATH.png.")] = None,
) -> None:
    """Show one neuron: what it writes and reads, where it is strongest in a text, its neighbours, its clamp curve."""
    from liveweight.tracing.clamping import parse_neuron
    from liveweight.tracing.plain_text import text_of

    parse_neuron(which)  # before the model is loaded
    read = text_of(text)
    with session.opened(options) as live:
        with output.bar(quiet=options.json) as bar:
            found = live.neuron(which, read, tokens=tokens, progress=output.counted(bar, "Reading the text"))
        output.print_report(found, as_json=options.json, picture=picture)
