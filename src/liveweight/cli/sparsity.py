"""`liveweight sparsity`: how many neurons a token really needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options


@takes_options
def sparsity(
    options: Options,
    text: Annotated[Path | None, typer.Option(help="Measure on this text file; else on a text that ships.")] = None,
    percent: Annotated[float, typer.Option("--percent", "-p", help="How much perplexity may rise, in per cent.")] = 1.0,
    tokens: Annotated[int, typer.Option(min=3, help="Tokens of the text.")] = 512,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Each layer alone as well; takes long.")] = True,
    picture: Annotated[Path | None, typer.Option(help="Draw it: PATH.html and PATH.png.")] = None,
) -> None:
    """Show the share of neurons' activations that can be zero, by magnitude, until perplexity rises by p per cent.

    For each layer alone, and for all at once by three rules: relative to each layer's median, one threshold, top-k.
    """
    with session.opened(options) as live:
        from liveweight.tracing.plain_text import text_of

        with output.bar(quiet=options.json) as bar:
            found = live.sparsity(
                None if text is None else text_of(text),
                percent=percent,
                tokens=tokens,
                layers=layers,
                progress=output.counted(bar, "Setting neurons to zero"),
            )
    output.print_report(found, as_json=options.json, picture=picture)
