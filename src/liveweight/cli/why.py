"""`liveweight why`: the neurons behind an answer, or any other part of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options

_MEASURES, _KINDS = ("gradient", "direct", "relp", "patching"), ("neurons", "mlp", "heads", "resid")


@takes_options
def why(
    options: Options,
    question: Annotated[str | None, typer.Argument(help="Ask this now; else the last reply.")] = None,
    reply: Annotated[str | None, typer.Option("--reply", "-r", help="An earlier reply by its id.")] = None,
    against: Annotated[str | None, typer.Option(help="Compare with this answer; else each token's runner-up.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Neurons, or parts, on each side.")] = 20,
    sites: Annotated[
        str | None, typer.Option(help="Which parts, at every token: neurons, mlp, heads or resid. (default mlp)")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="gradient, direct, relp or patching. (default gradient for neurons, relp for the others)"),
    ] = None,
    corrupted: Annotated[
        str | None, typer.Option(help="Compare parts with what they are behind this question; else with zero.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw layers by tokens: PATH.html and PATH.png.")] = None,
) -> None:
    """Show the neurons that pushed an answer most, and those that pushed against it.

    With --sites, --by, --corrupted or --picture: the parts of one kind at every layer and token, and what the answer's
    margin loses without each. A corrupted question has to have as many tokens as the question.
    """
    for value, allowed, flag in ((by, _MEASURES, "--by"), (sites, _KINDS, "--sites")):
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(allowed)}.", param_hint=flag)
    with session.opened(options) as live:
        judged = session.meant(live, reply, question)
        if sites is None and by is None and corrupted is None and picture is None:
            neurons = live.why(judged, against=against, top=top)
            if options.json:
                output.print_json({"reply": judged.label, **neurons.model_dump(mode="json")})
            else:
                output.out().print(neurons)
            return
        asked: dict[str, Any] = {"by": by, "sites": sites or "mlp", "against": against, "corrupted": corrupted}
        with output.bar(quiet=options.json) as bar:
            shown = output.counted(bar, "patching", visible=by == "patching")
            found = live.attribute(judged, **asked, top=top, progress=shown)
        written = {} if picture is None else {"pictures": output.draw(found, picture)}
        if options.json:
            output.print_json({"reply": judged.label, **found.model_dump(mode="json")} | written)
        else:
            output.out().print(found)
