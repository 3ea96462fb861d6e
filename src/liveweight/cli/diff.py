"""`liveweight diff`: two checkpoints side by side, and the difference as a change."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, check_keeping, takes_options


@takes_options
def diff(
    options: Options,
    a: Annotated[str, typer.Argument(metavar="A", help="The first model: smollm2, a hub id, a folder, a .gguf.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The second one, of the same shape.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the singular subspaces that are compared.")] = 8,
    labels: Annotated[bool, typer.Option(help="Compare the tokens that neurons write, too.")] = True,
    low_rank: Annotated[
        int | None, typer.Option(min=1, help="With --save or --keep: only so much of each matrix, not all of it.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the difference into this folder, as an adjustment.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="With --keep: a question to show.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the change by layer: PATH.html and PATH.png.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Commit the difference to A, if the guard lets it.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Show what the guard says and commit nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --keep: commit over the guard's budget.")] = False,
) -> None:
    """Show how a model B differs from a model A of the same shape: which weights, by how much, which neurons.

    With --keep the difference becomes a change of A in the workspace, which `undo` takes back.
    """
    commits = keep or preview
    check_keeping(keep, force, preview)
    if low_rank is not None and not (commits or save is not None):
        raise typer.BadParameter("--low-rank goes with --save, --keep or --preview.", param_hint="--low-rank")
    if prompt is not None and not commits:
        raise typer.BadParameter("--prompt goes with --keep or --preview.", param_hint="--prompt")
    told: dict[str, Any] = {}
    with ExitStack() as stack:
        bar = stack.enter_context(output.bar(quiet=options.json))
        progress = output.phases(bar)
        live = None
        if commits:  # the workspace is A's
            live = stack.enter_context(session.opened(replace(options, model=a)))
            found = live.diff(b, rank=rank, labels=labels, progress=progress)
        else:
            from liveweight.tracing import diff as compare

            found = compare(a, b, rank=rank, labels=labels, settings=options.settings(), progress=progress)
        bar.stop()
        told["diff"] = found.model_dump(mode="json")
        if not options.json:
            output.out().print(found)
        if picture is not None:
            told["pictures"] = output.draw(found, picture)
        if commits or save is not None:
            adjustment = found.adjustment(rank=low_rank)
            found.attach(None)  # the second model is needed no longer
            told["adjustment"] = {"name": adjustment.name, "note": adjustment.note, "ops": len(adjustment.ops)}
            if save is not None:
                adjustment.save(save)
                told["saved"] = str(save)
                output.say(f"saved in {save}: {adjustment.note}")
            if live is not None:
                change = live.apply(adjustment, prompt=prompt, preview=preview, force=force)
                told["change"] = change.as_dict()
                if not options.json:
                    output.print_change(change, as_json=False)
        if options.json:
            output.print_json(told)
