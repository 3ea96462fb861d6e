"""`liveweight neurons`: the labels of all neurons, made, searched, put together and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options

if TYPE_CHECKING:
    from liveweight.live_model import LiveModel
    from liveweight.tracing.atlas import Atlas, AtlasComparison, How, Side

_SIDES = ("promotes", "suppresses", "gate", "up")


@takes_options
def neurons(
    options: Options,
    find: Annotated[str | None, typer.Option("--find", "-f", help="Tokens that hold this text, ignoring case.")] = None,
    token: Annotated[str | None, typer.Option(help="This token, beside the space before it.")] = None,
    regex: Annotated[str | None, typer.Option(help="Tokens in which this regular expression is found.")] = None,
    side: Annotated[
        list[str] | None, typer.Option(help="Look in promotes, suppresses, gate or up only; may be repeated.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", "--layer", "-l", help="Only these layers: 5, or 0-14.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Neurons that are listed.")] = 20,
    merge: Annotated[
        list[Path] | None, typer.Option(help="Take over the labels in another machine's file; may be repeated.")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Another model: how many neurons keep their top token.")] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="For large models: a rounded product, the likeliest tokens exactly; kept apart."),
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="With --compare: draw it, PATH.html and PATH.png.")] = None,
) -> None:
    """Label every neuron by the tokens that it writes and reads, and search the labels.

    Labels are made once a model and kept. Without anything to look for, it says how many there are and where. Layers do
    not depend on each other: let many machines label some --layers each, and put their files together with --merge.
    """
    from liveweight.tracing.atlas import layer_range

    looked = [(how, text) for how, text in (("text", find), ("token", token), ("regex", regex)) if text is not None]
    if len(looked) > 1:
        raise typer.BadParameter("Give one of --find, --token and --regex.")
    if compare is not None and looked:
        raise typer.BadParameter("Compare, or look for something; not both.", param_hint="--compare")
    if picture is not None and compare is None:
        raise typer.BadParameter("--picture draws what --compare finds.", param_hint="--picture")
    for each in side or []:
        if each not in _SIDES:
            raise typer.BadParameter(f"{each!r} is none of {', '.join(_SIDES)}.", param_hint="--side")
    chosen = None if layers is None else layer_range(layers)
    with session.opened(options) as live:
        if merge:
            _merge(live, merge)
        with output.bar(quiet=options.json) as bar:
            atlas = live.atlas(chosen, output.counted(bar, "Labelling neurons"), fast=fast)
        if compare is not None:
            output.print_report(_compared(live, atlas, compare, options, fast), as_json=options.json, picture=picture)
        elif looked:
            how, text = looked[0]
            found = atlas.find(text, how=cast("How", how), sides=cast("list[Side] | None", side), top=top)
            output.print_report(found, as_json=options.json)
        else:
            from liveweight.tracing.atlas import coverage

            output.print_report(coverage(live.engine, live.settings.cache_dir, fast=fast), as_json=options.json)


def _merge(live: LiveModel, files: list[Path]) -> None:
    from liveweight.tracing.atlas import merge

    new = merge(live.engine, files, live.settings.cache_dir)
    output.say(f"{new:,} labels were new")


def _compared(live: LiveModel, atlas: Atlas, other: str, options: Options, fast: bool) -> AtlasComparison:
    from liveweight.engines.model_source import load, resolve
    from liveweight.engines.transformers import TransformersEngine
    from liveweight.tracing.atlas import read_atlas

    own = live.settings
    found = resolve(other, settings=own.model_copy(update={"revision": None}))  # the revision is the first one's
    loaded = load(found, dtype=own.dtype, device=own.device, progress=not options.json)
    engine = TransformersEngine(loaded, threads=own.threads, spare_neurons=0)
    with output.bar(quiet=options.json) as bar:
        shown = output.counted(bar, f"Labelling the neurons of {other}")
        rest = read_atlas(engine, atlas.layers, cache_dir=own.cache_dir, progress=shown, fast=fast)
    return atlas.compare(rest)
