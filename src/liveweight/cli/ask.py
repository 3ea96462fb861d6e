"""`liveweight ask`: one question, one answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options


@takes_options
def ask(
    options: Options,
    question: Annotated[str, typer.Argument(help="What to ask; - reads it from stdin.")],
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of the answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this mass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Ask one question. The answer goes to stdout; its id (r3) to stderr."""
    text = sys.stdin.read() if question == "-" else question
    with session.opened(options) as live:
        show = (lambda token: print(token.text, end="", flush=True)) if not options.json else None
        reply = live.chat(
            text,
            system=system,
            on_token=show,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        if options.json:
            output.print_json({"label": reply.label, **reply.model_dump(mode="json")})
        else:
            print()
            output.say(f"{reply.label}, {', '.join(reply.versions)}")
