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
    shown = output.table("weight", "value>", "activation>", "perplexity>", "without it>", "")
    for weight in found.weights:
        shown.add_row(
            f"{weight.site} [{weight.row}, {weight.column}]",
            f"{weight.value:.3f}",
            f"{weight.activation:.0f}",
            f"{weight.perplexity:.1f}",
            f"{weight.perplexity_zeroed:,.0f}",
            "protected" if weight.confirmed else "harmless",
        )
    output.out().print(shown if found.weights else "No super weights were found.")
