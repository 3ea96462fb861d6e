"""`liveweight super-weights`: the few numbers that hold the model together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options


@takes_options
def super_weights(
    options: Options,
    report: Annotated[bool, typer.Option("--report", help="Tell the whole story of one of them.")] = False,
    number: Annotated[int, typer.Option(min=0, help="With --report: which one; 0 is the most damaging.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="With --report: a folder with mmlu.json, sst2.json, cola.json.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="With --data: samples of each.")] = 100,
    text: Annotated[Path | None, typer.Option(help="With --report: measure perplexity on this text file.")] = None,
    tokens: Annotated[int, typer.Option(min=3, help="With --report: tokens of it.")] = 1280,
    picture: Annotated[Path | None, typer.Option(help="With --report: draw it: PATH.html and PATH.png.")] = None,
) -> None:
    """Find the super weights (once a model), and show what the perplexity becomes without each.

    --report tells of one: its spike over the layers, perplexity with it zero, weaker, stronger and restored, what the
    model says with and without it, and with --data what it still knows.
    """
    if not report:
        for given, flag in ((data, "--data"), (text, "--text"), (picture, "--picture"), (number or None, "--number")):
            if given is not None:
                raise typer.BadParameter(f"{flag} goes with --report.", param_hint=flag)
    with session.opened(options) as live, Progress(console=output.progress(), transient=True) as bar:
        task = bar.add_task("Looking for super weights", total=None, visible=not options.json)
        found = live.super_weights(lambda done, of: bar.update(task, completed=done, total=of))
        if not report:
            if options.json:
                output.print_json(found.model_dump(mode="json"))
            else:
                output.out().print(found)
            return
        from liveweight.tracing.plain_text import text_of

        told = live.super_weight_report(
            number=number,
            data=data,
            samples=samples,
            text=None if text is None else text_of(text),
            tokens=tokens,
            progress=lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
        )
    output.print_report(told, as_json=options.json, picture=picture)
