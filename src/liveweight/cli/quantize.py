"""`liveweight quantize`: the weights rounded to a few bits, with the super weights held out or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, check_keeping, takes_options


@takes_options
def quantize(
    options: Options,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits a weight.")] = 4,
    block: Annotated[str, typer.Option(help="64: squares of 64 x 64. 1x64: rows x columns.")] = "64",
    clip_z: Annotated[
        float | None, typer.Option(help="Clip each block at so many standard deviations before rounding.")
    ] = None,
    clip_percentile: Annotated[
        float | None, typer.Option(help="Or to the range of its middle so many per cent.")
    ] = None,
    keep_super_weights: Annotated[
        bool, typer.Option("--keep-super-weights", help="Hold the super weights out, bit for bit.")
    ] = False,
    activations: Annotated[
        int | None, typer.Option(min=2, max=8, help="Round the inputs of down and o, too, to so many bits.")
    ] = None,
    keep_super_activations: Annotated[
        bool, typer.Option("--keep-super-activations", help="With both: hold the super neurons' activations out, too.")
    ] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Round embeddings and unembedding, too.")] = False,
    text: Annotated[Path | None, typer.Option(help="Measure on this text file; else on a text that ships.")] = None,
    tokens: Annotated[int, typer.Option(min=3, help="Tokens of it.")] = 1280,
    export: Annotated[Path | None, typer.Option(help="Write the quantised model into this new folder.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Commit it, if the guard lets it.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Show what the guard says and commit nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --keep: commit over the guard's budget.")] = False,
) -> None:
    """Round the blocks' linear weights to a few bits and show what it costs, super weights held out and not.

    Embeddings and unembedding are left alone unless --embeddings is given. Without --keep or --export nothing is kept.
    The guard refuses most of these; a change that is not forced never rounds a super weight. undo, off and strength
    work on it as on any change.
    """
    if clip_z is not None and clip_percentile is not None:
        raise typer.BadParameter("Give --clip-z or --clip-percentile, not both.", param_hint="--clip-z")
    check_keeping(keep, force, preview)
    if keep_super_activations and (activations is None or not keep_super_weights):
        raise typer.BadParameter(
            "Give --activations and --keep-super-weights, too.", param_hint="--keep-super-activations"
        )
    if export is not None:
        from liveweight.engines.export import empty_folder

        empty_folder(export)  # before anything that takes long
    with session.opened(options) as live:
        from liveweight.tracing.plain_text import text_of

        with output.bar(quiet=options.json) as bar:
            found = live.quantization(
                bits,
                block,
                clip="z" if clip_z is not None else "percentile" if clip_percentile is not None else "none",
                clip_at=clip_z if clip_z is not None else clip_percentile if clip_percentile is not None else 0.0,
                activations=activations,
                embeddings=embeddings,
                keep_super_weights=keep_super_weights,
                keep_super_activations=keep_super_activations,
                text=None if text is None else text_of(text),
                tokens=tokens,
                progress=output.counted(bar, "Measuring"),
            )
        shown: dict[str, Any] = {"quantization": found.model_dump(mode="json")}
        if not options.json:
            output.out().print(found)
        if export is not None:
            written = live.export(export, found.adjustment)
            shown["exported"] = str(written)
            output.say(f"written to {written}")
        if keep or preview:
            change = live.apply(found.adjustment, preview=preview, force=force)
            shown["change"] = change.as_dict()
            if not options.json:
                output.print_change(change, as_json=False)
    if options.json:
        output.print_json(shown)
