"""`liveweight clamp`: neurons held at values, and what the model then says."""

from __future__ import annotations

from typing import Annotated

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, check_keeping, takes_options


@takes_options
def clamp(
    options: Options,
    clamps: Annotated[list[str], typer.Argument(metavar="LAYER:NEURON=VALUE...", help="Such as 20:1114=8.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; with --raw any text.")],
    raw: Annotated[bool, typer.Option("--raw", help="Plain text, without the chat's template.")] = False,
    tokens: Annotated[int, typer.Option(min=0, help="Tokens of the two answers.")] = 40,
    keep: Annotated[bool, typer.Option("--keep", help="Commit it, if the guard lets it.")] = False,
    name: Annotated[str, typer.Option(help="The kept change's name.")] = "",
    force: Annotated[bool, typer.Option("--force", help="With --keep: commit over the guard's budget.")] = False,
) -> None:
    """Hold neurons at values, and show the answer without and with it: clamp 20:1114=8 --prompt "I like"."""
    from liveweight.tracing.clamping import parse_clamps

    check_keeping(keep, force)
    values = parse_clamps(clamps)
    with session.opened(options) as live:
        found = live.clamp(values, prompt, raw=raw, max_tokens=tokens)
        if not options.json:
            output.out().print(found)
        change = None
        if keep:
            change = live.apply(live.clamping(values, name), prompt=None if raw else prompt, force=force)
        if options.json:
            told = found.model_dump(mode="json")
            output.print_json(told | {"change": None if change is None else change.as_dict()})
        elif change is not None:
            output.print_change(change, as_json=False)
