"""`liveweight contrast`: the neurons that tell two sides of prompts apart, shown before anything is changed.

Owns reading the two files, the table and the volcano plot. Knows nothing of statistics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from liveweight.cli import output, session
from liveweight.cli.options import Options, check_keeping, takes_options
from liveweight.shown import table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from liveweight.methods.contrast import Contrast, Given
    from liveweight.reports import Change

_OTHERS = 3000  # points of the plot that no adjustment would take; the rest of these are left out


@takes_options
def contrast(
    options: Options,
    a: Annotated[Path | None, typer.Argument(metavar="A", help="A file of prompts whose answers are to go.")] = None,
    b: Annotated[Path | None, typer.Argument(metavar="B", help="A file of prompts whose answers are to stay.")] = None,
    feedback: Annotated[bool, typer.Option("--feedback", help="Your own bad and good replies instead.")] = False,
    completion: Annotated[bool, typer.Option("--completion", help="Prompts are text to go on from.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Neurons in the table.")] = 20,
    both: Annotated[bool, typer.Option("--both", help="Turn B's neurons up as well.")] = False,
    gone: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="The share of A's answers that is to go; unset, 0.75.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Commit a change: A's neurons turned down.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Show that change's report and commit nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --keep, commit over the guard's budget.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw effect sizes and p-values to PATH.html and .png.")] = None,
) -> None:
    """Show which neurons tell two sides of prompts apart; with --keep, turn A's down and leave B's answers.

    A file holds a prompt a line, or JSON Lines with "prompt" and, where the model's own is not meant, "answer".
    """
    if feedback == (a is not None) or (a is None) != (b is None):
        raise typer.BadParameter("Give two files, or --feedback without files.", param_hint="A B")
    check_keeping(keep, force, preview)
    sides = (read_prompts(a), read_prompts(b)) if a is not None and b is not None else None
    with session.opened(options) as live:
        if sides is None or a is None or b is None:
            found = live.contrast()
        else:
            found = live.contrast(*sides, names=(a.stem, b.stem), completion=completion)
        told: dict[str, Any] = {"contrast": found.as_dict(top)}
        if not options.json:
            output.out().print(neurons_view(found, top))
        if picture is not None:
            from liveweight import pictures

            told["pictures"] = [str(path) for path in pictures.save(volcano(found), picture)]
            if not options.json:
                output.say("drawn: " + ", ".join(told["pictures"]))
        change: Change | None = None
        try:
            if keep or preview:
                adjustment = found.adjustment(both=both, gone=gone)
                change = live.apply(adjustment, prompt=found.question, preview=preview, force=force)
        finally:  # the table is printed first, also where the guard refuses
            if options.json:
                output.print_json({**told, "change": change.as_dict() if change is not None else None})
        if change is not None and not options.json:
            output.print_change(change, as_json=False)


def read_prompts(path: Path) -> list[Given]:
    """The prompts of a file, a line each: plain text, or JSON Lines with "prompt" and perhaps "answer".

    Raises InvalidInput naming the file, and the line that is not understood.
    """
    from liveweight.errors import InvalidInput
    from liveweight.line_files import read_lines

    kept = read_lines(path, "Give a file of prompts, a line each.")
    if not kept or not kept[0][1].lstrip().startswith("{"):
        return [line for _, line in kept]
    found: list[Given] = []
    for number, line in kept:
        try:
            value = json.loads(line)
            prompt, answer = value["prompt"], value.get("answer")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"Line {number} of {path} is not an object with a prompt.",
                hint='Write {"prompt": "…", "answer": "…"}; the answer may be left out.',
            ) from error
        if not isinstance(prompt, str) or not isinstance(answer, str | None):
            raise InvalidInput(f"Line {number} of {path} holds something else than text.", hint="Put it in quotes.")
        found.append(prompt if answer is None else (prompt, answer))
    return found


def neurons_view(found: Contrast, top: int) -> RenderableType:
    """The strongest neurons, one a line."""
    a, b = found.names
    head = Text.assemble((f"{a} ({len(found.a)})", "bold"), " against ", (f"{b} ({len(found.b)})", "bold"))
    tested = f"{found.significant:,} of {found.separation.tested:,} neurons differ (q < 0.05)"
    head.append(f"\n{tested}; {found.eligible:,} of them by half a deviation, and push the answers", "dim")
    means = (f"{name[:8]}>" for name in (a, b))
    shown = table("neuron", "more in", "effect>", "q>", "consistent>", *means, "push>")
    for each in found.neurons(top):
        shown.add_row(
            Text(f"L{each.layer}/{each.neuron}", "bold"),
            Text((a if each.side == "a" else b)[:10]),
            f"{each.effect_size:+.2f}",
            f"{each.q:.0e}",
            f"{each.consistency:.0%}",
            f"{each.mean_a:+.2f}",
            f"{each.mean_b:+.2f}",
            f"{each.push:.3f}",
        )
    return Group(head, Text(), shown)


def volcano(found: Contrast) -> Figure:
    """Effect size against -log10 of the corrected p-value; what an adjustment would take from is coloured."""
    import numpy as np
    from plotly.graph_objects import Figure, Scatter

    separation = found.separation
    effect = separation.effect_size.flatten().numpy()
    surprise = -np.log10(np.maximum(separation.q.flatten().numpy(), 1e-40))
    width = separation.q.shape[1]
    chosen = found.neurons(found.eligible)
    taken = {each.layer * width + each.neuron for each in chosen}
    rest = np.array([place for place in np.flatnonzero(effect) if place not in taken], dtype=int)
    rest = rest[:: max(1, len(rest) // _OTHERS)]
    figure = Figure()

    def points(places: Any, name: str, colour: str, size: int) -> None:
        figure.add_trace(
            Scatter(
                x=effect[places],
                y=surprise[places],
                mode="markers",
                name=name,
                marker={"color": colour, "size": size, "opacity": 0.6},
                text=[f"L{place // width}/{place % width}" for place in places],
                hovertemplate="%{text}<br>effect size %{x:.2f}<br>-log10 q %{y:.1f}<extra></extra>",
            )
        )

    points(rest, "other neurons", "#b8b8b8", 4)
    for side, name, colour in (("a", found.names[0], "#c0392b"), ("b", found.names[1], "#2471a3")):
        places = np.array([each.layer * width + each.neuron for each in chosen if each.side == side], dtype=int)
        points(places, f"write for {name}", colour, 5)
    figure.add_hline(y=-np.log10(0.05), line_dash="dot", line_color="#888888")
    figure.update_layout(
        title=f"Neurons that tell {found.names[0]} from {found.names[1]}",
        xaxis_title=f"effect size, Cohen's d (right: higher in {found.names[0]})",
        yaxis_title="-log10 of the corrected p-value q",
        template="plotly_white",
    )
    return figure
