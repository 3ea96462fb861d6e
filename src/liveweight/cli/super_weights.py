"""`liveweight super-weights`: the few numbers that hold the model together."""

from __future__ import annotations

from rich.progress import Progress

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options


@takes_options
def super_weights(options: Options) -> None:
    """Find the super weights (once a model), and show what the perplexity becomes without each."""
    with session.opened(options) as live, Progress(console=output.progress(), transient=True) as bar:
        task = bar.add_task("Looking for super weights", total=None, visible=not options.json)
        found = live.super_weights(lambda done, of: bar.update(task, completed=done, total=of))
    if options.json:
        output.print_json(found.model_dump(mode="json"))
        return
    output.out().print(found)
