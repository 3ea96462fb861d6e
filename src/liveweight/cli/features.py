"""`liveweight features`: groups of neurons that fire together, shown, steered with, kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from liveweight.cli import output, session
from liveweight.cli.options import Options, check_keeping, takes_options
from liveweight.shown import grid, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from liveweight.live_model import LiveModel
    from liveweight.methods.direction import Directed
    from liveweight.tracing import Features

_MEASURES = ("p95", "mean")


@takes_options
def features(
    options: Options,
    number: Annotated[int | None, typer.Argument(min=0, help="Show this one; else the list.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Which MLP; else one at 0.75 of the depth.")] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="How many features (100).")] = None,
    share: Annotated[float | None, typer.Option(help="The share of neurons that each keeps (0.02).")] = None,
    text: Annotated[Path | None, typer.Option(help="Read this file; else the plain English that ships.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens to read at most, spread over it (8192).")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of the fit at most (200).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Where the fit begins (0).")] = None,
    top: Annotated[int, typer.Option(min=1, help="Features in the list.")] = 20,
    steer: Annotated[
        float | None, typer.Option(help="Steer with it: 1 is the strength of the wished KL, -1 its opposite.")
    ] = None,
    kl: Annotated[float, typer.Option(help="The KL on neutral prompts at strength 1, in nats.")] = 0.5,
    measure: Annotated[str, typer.Option(help="Which KL: p95 or mean over neutral prompts.")] = "p95",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Show its answer without and with.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the steering into this folder.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw error and coefficients: PATH.html and PATH.png.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Commit the steering, if the guard lets it.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Show what the guard says and commit nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --keep: commit over the guard's budget.")] = False,
) -> None:
    """Find groups of neurons that fire together, and show what each fires on and what it writes.

    They are kept: `features 7` shows one of those that were asked for last, `features 7 --steer 1` steers with it.
    """
    if measure not in _MEASURES:
        raise typer.BadParameter(f"{measure!r} is none of {', '.join(_MEASURES)}.", param_hint="--measure")
    if steer is not None and number is None:
        raise typer.BadParameter("Say which feature to steer with: features 7 --steer 1.", param_hint="--steer")
    if steer == 0:
        raise typer.BadParameter("A strength of 0 changes nothing.", param_hint="--steer")
    if steer is None and (keep or preview or force or save is not None or prompt is not None):
        raise typer.BadParameter("--prompt, --save, --keep, --preview and --force go with --steer.")
    check_keeping(keep, force, preview)
    wished: dict[str, Any] = {"layer": layer, "k": k, "share": share, "tokens": tokens, "rounds": rounds, "seed": seed}
    wished = {name: value for name, value in wished.items() if value is not None}
    if text is not None:
        from liveweight.tracing.plain_text import text_of

        wished |= {"text": text_of(text), "text_name": text.name}
    with session.opened(options) as live:
        found = live.last_features() if number is not None and not wished else _made(live, wished, options)
        told: dict[str, Any] = {"features": found.model_dump(mode="json", exclude={"features"})}
        if number is None:
            told["list"] = [each.model_dump(mode="json") for each in found.features]
            if not options.json:
                output.out().print(found.view(top))
        else:
            one = live.feature(number, found)
            told["feature"] = one.model_dump(mode="json")
            if not options.json:
                output.out().print(one)
        if picture is not None:
            told["pictures"] = output.draw(found, picture)
        if steer is not None and number is not None:
            directed = live.steer_feature(number, found, kl=kl, measure="mean" if measure == "mean" else "p95")
            told["steering"] = directed.as_dict() | {"strength": steer}
            adjustment = directed.adjustment(steer)
            if not options.json:
                output.out().print(Text(), view(directed))
            if save is not None:
                adjustment.save(save)
                told["saved"] = str(save)
                output.say(f"saved in {save}")
            if prompt is not None:
                without, steered = live.tried(adjustment, prompt)
                told["answers"] = {"prompt": prompt, "without": without, "with": steered}
                if not options.json:
                    shown = table("without", "with", title=Text(prompt))
                    shown.add_row(Text(without), Text(steered, style="green"))
                    output.out().print(shown)
            if keep or preview:
                change = live.apply(adjustment, prompt=prompt, preview=preview, force=force)
                told["change"] = change.as_dict()
                if not options.json:
                    output.print_change(change, as_json=False)
        if options.json:
            output.print_json(told)


def view(found: Directed) -> RenderableType:
    """A steering along a direction: its strength and what it costs."""
    return grid(
        [
            ("steer", Text(found.name)),
            ("factor", Text(f"{found.factor:.3g} at strength 1, which adds a vector of length {found.norm:.1f}")),
            (
                "KL",
                Text(
                    f"{found.measure} {found.reached:.3f} of {found.target:g} nats, mean {found.mean_kl:.3f}, "
                    f"p95 {found.p95_kl:.3f}, on {found.neutral} neutral prompts"
                ),
            ),
            ("effect", Text(f"{found.effect:+.3f} nats for the tokens that it writes, at those prompts")),
        ]
    )


def _made(live: LiveModel, wished: dict[str, Any], options: Options) -> Features:
    with output.bar(quiet=options.json) as bar:
        return live.features(**wished, progress=output.phases(bar))
