"""`liveweight arena`: the methods side by side, on the same cases and this very model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_method_settings, takes_options

EVERY = "all"


@takes_options
@takes_method_settings
def arena(
    options: Options,
    data: Annotated[str, typer.Option(help="counterfact, qaedit, zsre, countries, or a file in one of their forms.")],
    folder: Annotated[Path | None, typer.Option(help="The folder that holds the data sets.")] = None,
    methods: Annotated[str, typer.Option(help="all, or names with commas between them; auto is the ladder.")] = EVERY,
    cases: Annotated[int, typer.Option("--cases", "-n", min=1, help="How many cases.")] = 20,
    first: Annotated[int, typer.Option(min=0, help="The number of the first case.")] = 0,
    mode: Annotated[str, typer.Option(help="single, sequential (in one model), or batch (all at once).")] = "single",
    out: Annotated[Path, typer.Option(help="The run's file; table and picture lie beside it.")] = Path("arena.json"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that file.")] = False,
    seed: Annotated[int, typer.Option(help="Of whatever is drawn.")] = 0,
    damage_every: Annotated[int, typer.Option(min=1, help="KL and perplexity on every so many single cases.")] = 1,
    measured: Annotated[
        int | None, typer.Option(min=1, help="Measure so many of a sequence's edits at each point; unset, all.")
    ] = None,
    collapse: Annotated[float, typer.Option(min=1.0, help="Perplexity ratio at which a sequence ends.")] = 100.0,
    text_tokens: Annotated[int, typer.Option(min=8, help="Of plain text, for the perplexity.")] = 2048,
) -> None:
    """Compare methods on the same cases: success in both families of figures, damage, cost, exact undo."""
    from liveweight.errors import InvalidInput
    from liveweight.evaluation.arena import Arena, Plan
    from liveweight.evaluation.arena_report import figure, markdown, summary
    from liveweight.evaluation.edits import edits
    from liveweight.evaluation.sources import neutral_ground
    from liveweight.methods import METHODS
    from liveweight.pictures import save

    if mode not in ("single", "sequential", "batch"):
        raise InvalidInput(f"There is no mode {mode!r}.", hint="Use single, sequential or batch.")
    chosen = edits(data, folder, limit=first + cases)[first:]
    if not chosen:
        raise InvalidInput(f"{data} has no case number {first}.", hint="Name an earlier --first.")
    names = tuple(METHODS) if methods == EVERY else tuple(name.strip() for name in methods.split(","))
    plan = Plan(
        data,
        tuple(chosen),
        names,
        mode,  # type: ignore[arg-type]
        seed=seed,
        damage_every=damage_every,
        measured=measured,
        collapse=collapse,
    )
    with session.opened(options) as live, output.bar(quiet=options.json) as bar:
        task = bar.add_task("", total=None)

        def progress(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        neutral, text = neutral_ground(folder, live.guard.probes)
        found = Arena(
            live.engine,
            live.guard,
            live.settings.methods,
            plan,
            neutral=neutral,
            text=text,
            text_tokens=text_tokens,
            progress=progress,
        ).run(out, resume=resume)
    table = markdown(found)
    out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    pictures = save(figure(found), out)
    if options.json:
        output.print_json(summary(found))
        return
    output.out().print(table, soft_wrap=True, markup=False)
    written = ", ".join(str(each) for each in (out, out.with_suffix(".md"), *pictures))
    output.say(f"written: {written}")
