"""`liveweight massive`: the few activations that are thousands of times larger than all others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options


@takes_options
def massive(
    options: Options,
    prompt: Annotated[str | None, typer.Argument(help="A question, in the chat template unless --raw.")] = None,
    text: Annotated[Path | None, typer.Option(help="Or a file of plain text.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt is plain text, without the chat's template.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read at most.")] = 1280,
    picture: Annotated[Path | None, typer.Option(help="Draw the layers: PATH.html and PATH.png.")] = None,
) -> None:
    """Show massive activations: |value| above 100 and above 1,000 times the median of their site.

    On a question, or on a text file: in which layer and dimension, how large, and on which tokens.
    """
    if (prompt is None) == (text is None):
        raise typer.BadParameter("Give a prompt, or a file with --text.")
    if raw and prompt is None:
        raise typer.BadParameter("--raw goes with a prompt.", param_hint="--raw")
    with session.opened(options) as live:
        from liveweight.tracing.plain_text import text_of

        with output.bar(quiet=options.json) as bar:
            found = live.massive(
                prompt if prompt is not None else text_of(text) if text is not None else "",
                chat=prompt is not None and not raw,
                tokens=tokens,
                progress=output.counted(bar, "Reading"),
            )
    output.print_report(found, as_json=options.json, picture=picture)
