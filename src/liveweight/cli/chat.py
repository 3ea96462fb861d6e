"""`liveweight chat`: talk, judge, and see the next answer come from the mended model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.text import Text

from liveweight.cli import output, session, slash
from liveweight.cli.options import Options, takes_options
from liveweight.errors import LiveweightError


@takes_options
def chat(
    options: Options,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of an answer.")] = None,
) -> None:
    """Talk with the model. /fix, /bad, /good and /why work on the last answer; /help lists the rest.

    /undo takes the newest change back.

    With --json each line of stdin is a turn or a command, and what comes of it one line of JSON.
    """
    with session.opened(options) as live:
        talk = slash.Talk(live, lambda prompt: _read(options, prompt), as_json=options.json)
        if not options.json:
            output.progress().print("Say something; /help lists the commands, Ctrl-D leaves.", style="dim")
        while (line := _read(options)) is not None:
            try:
                if line.startswith("/"):
                    if slash.run(talk, line):
                        break
                elif line:
                    _answer(options, talk, line, system, temperature, max_tokens)
            except LiveweightError as error:
                output.print_error(error, as_json=options.json)
            except KeyboardInterrupt:
                # Of the reply what was said is kept; a change under way was not made.
                output.progress().print(Text("\nInterrupted.", style="yellow"))


def _read(options: Options, prompt: str = "> ") -> str | None:
    """The next line, or None at the end."""
    interactive = sys.stdin.isatty()
    try:
        if not interactive:
            line = sys.stdin.readline()
            return line.strip() if line else None
        return input(prompt if not options.json else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return None


def _answer(
    options: Options, talk: slash.Talk, line: str, system: str | None, temperature: float | None, max_tokens: int | None
) -> None:
    begins = {"system": system} if talk.last is None else {}
    stream = talk.live.stream(line, after=talk.last, temperature=temperature, max_tokens=max_tokens, **begins)
    try:
        for token in stream:
            if not options.json:
                print(token.text, end="", flush=True)
    finally:
        stream.close()
        if stream.begun:  # also where it was interrupted: what is said next is said of this reply
            talk.last = stream.reply
    if options.json:
        output.print_json_line({"label": stream.reply.label, **stream.reply.model_dump(mode="json")})
    else:
        print()
