"""`liveweight tune`: the settings that methods work best with on this very model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_method_settings, takes_options
from liveweight.shown import table

if TYPE_CHECKING:
    from liveweight.evaluation.tuning import Tuned


@takes_options
@takes_method_settings
def tune(
    options: Options,
    data: Annotated[str, typer.Option(help="counterfact, qaedit, zsre, countries, or a file in one of their forms.")],
    methods: Annotated[str, typer.Option(help="Names with commas between them.")] = "rome,memit",
    folder: Annotated[Path | None, typer.Option(help="The folder that holds the data sets.")] = None,
    cases: Annotated[int, typer.Option("--cases", "-n", min=1, help="How many edits each trial makes.")] = 12,
    first: Annotated[int, typer.Option(min=0, help="The number of the first one; keep clear of a benchmark's.")] = 0,
    trials: Annotated[int, typer.Option(min=1, help="How many settings are tried for each method.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
) -> None:
    """Search each method's settings by success and damage, and keep them for this model; `auto` uses them.

    Run it again with the same options to go on, or with more trials to search further.
    """
    from liveweight.errors import InvalidInput
    from liveweight.evaluation.edits import edits
    from liveweight.evaluation.tuning import tune as search
    from liveweight.methods.tuned import tuned_file

    chosen = edits(data, folder, limit=first + cases)[first:]
    if not chosen:
        raise InvalidInput(f"{data} has no case number {first}.", hint="Name an earlier --first.")
    names = [name.strip() for name in methods.split(",")]
    with session.opened(options) as live, output.bar(quiet=options.json) as bar:
        task = bar.add_task("", total=None)

        def progress(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        engine, settings = live.engine, live.settings.methods
        found = search(engine, live.guard, settings, chosen, names, trials=trials, seed=seed, progress=progress)
        file = tuned_file(engine)
    if options.json:
        output.print_json([_told(each) for each in found])
        return
    for each in found:
        output.out().print(_view(each))
    output.say(f"kept in {file}")


def _told(tuned: Tuned) -> dict[str, Any]:
    tried = [{"settings": each.settings, "success": each.success, "damage": each.damage} for each in tuned.tried]
    return {"method": tuned.method, "chosen": tuned.chosen.settings, "tried": tried}


def _view(tuned: Tuned) -> Any:
    names = list(tuned.chosen.settings)
    shown = table("", *(f"{name}>" for name in names), "success>", "damage>", title=tuned.method)
    for number, each in enumerate(tuned.tried):
        mark = "chosen" if each == tuned.chosen else "defaults" if number == 0 else ""
        values = [f"{each.settings[name]:.3g}" for name in names]
        shown.add_row(Text(mark, "green"), *values, f"{each.success:.1%}", f"{each.damage:.2f}")
    return shown
