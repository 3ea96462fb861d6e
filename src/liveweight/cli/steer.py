"""`liveweight steer`: a direction that makes one thing likelier than its opposite, with layer and strength found."""

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

    from liveweight.adjustments import Adjustment
    from liveweight.live_model import LiveModel
    from liveweight.methods.steer import Steering

_HOWS, _MEASURES = ("mean", "pca", "pair", "tuned"), ("p95", "mean")


@takes_options
def steer(
    options: Options,
    words: Annotated[str | None, typer.Argument(help='Two words or texts: "Love - Hate".')] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="JSON lines of pairs: Anthropic's evals format, or {positive, negative}."),
    ] = None,
    toward: Annotated[Path | None, typer.Option(help="What is wished for, a question or chat a line.")] = None,
    away: Annotated[Path | None, typer.Option(help="Its opposite, likewise.")] = None,
    load: Annotated[Path | None, typer.Option(help="A steering that --save wrote.")] = None,
    how: Annotated[
        str,
        typer.Option(help="mean: of the differences. pca: their component. pair: the first. tuned: trained on them."),
    ] = "mean",
    layer: Annotated[int | None, typer.Option(min=0, help="The layer; else the one with most effect per KL.")] = None,
    kl: Annotated[float, typer.Option(help="The KL on neutral prompts to calibrate to, in nats.")] = 0.5,
    measure: Annotated[str, typer.Option(help="Which KL: p95 or mean over neutral prompts.")] = "p95",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Show its answer without and with.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write it into this folder.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the curve: PATH.html and PATH.png.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Commit it, if the guard lets it.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Show what the guard says and commit nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --keep: commit over the guard's budget.")] = False,
) -> None:
    """Steer toward one thing and away from its opposite: steer "Love - Hate" --prompt "How was your day?".

    Direction, layer and strength are found, the strength by its KL on neutral prompts. Nothing is committed without
    --keep.
    """
    for value, allowed, flag in ((how, _HOWS, "--how"), (measure, _MEASURES, "--measure")):
        if value not in allowed:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(allowed)}.", param_hint=flag)
    given = [words is not None, pairs is not None, toward is not None or away is not None, load is not None]
    if sum(given) != 1:
        raise typer.BadParameter('Give one of WORDS ("Love - Hate"), --pairs, --toward with --away, or --load.')
    if (toward is None) != (away is None):
        raise typer.BadParameter("Give both --toward and --away.")
    if load is not None and picture is not None:
        raise typer.BadParameter("A loaded steering has no curve to draw.", param_hint="--picture")
    check_keeping(keep, force, preview)
    with session.opened(options) as live:
        found = None
        if load is None:
            found = _found(live, words, pairs, toward, away, {"how": how, "layer": layer, "kl": kl, "measure": measure})
        adjustment = _loaded(load) if found is None else found.adjustment()
        shown: dict[str, Any] = {"steering": None if found is None else found.as_dict(), "name": adjustment.name}
        if not options.json:
            output.out().print(Text(f"{adjustment.name}. {adjustment.note}") if found is None else view(found))
        if save is not None:
            adjustment.save(save)
            shown["saved"] = str(save)
            output.say(f"saved in {save}")
        if picture is not None and found is not None:
            from liveweight import pictures

            written = pictures.save(found.picture(), picture)
            shown["pictures"] = [str(path) for path in written]
            output.say(f"drawn: {', '.join(map(str, written))}")
        if prompt is not None:
            without, steered = live.tried(adjustment, prompt)
            shown["answers"] = {"prompt": prompt, "without": without, "with": steered}
            if not options.json:
                output.out().print(_side_by_side(prompt, without, steered))
        try:
            if keep or preview:
                change = live.apply(adjustment, prompt=prompt, preview=preview, force=force)
                shown["change"] = change.as_dict()
                if not options.json:
                    output.print_change(change, as_json=False)
        finally:  # what was found is told also where the guard refuses
            if options.json:
                output.print_json(shown)


def _found(
    live: LiveModel, words: str | None, pairs: Path | None, toward: Path | None, away: Path | None, how: dict[str, Any]
) -> Steering:
    from liveweight.methods.sides import read_pairs, read_side

    if pairs is not None:
        return live.steer(pairs=read_pairs(pairs), name=pairs.stem, **how)
    if toward is not None and away is not None:
        name = f"{toward.stem} - {away.stem}"
        return live.steer(toward=read_side(toward), away=read_side(away), name=name, **how)
    return live.steer(words, **how)


def _loaded(folder: Path | None) -> Adjustment:
    from liveweight.adjustments import Adjustment

    assert folder is not None
    return Adjustment.load(folder)


def view(found: Steering) -> RenderableType:
    """What was found, the curve, the layers."""
    from rich.console import Group

    rows: list[tuple[str, RenderableType]] = [
        ("steer", Text(f"{found.name} ({found.how} of {found.examples} examples)")),
        ("layer", Text(f"{found.layer} ({'chosen' if found.layers else 'given'})")),
        ("factor", Text(f"{found.factor:.3g}, which adds a vector of length {found.norm:.1f}")),
        (
            "KL",
            Text(
                f"{found.measure} {found.reached:.3f} of {found.target:g} nats, mean {found.mean_kl:.3f}, "
                f"p95 {found.p95_kl:.3f}, on {found.neutral} neutral prompts"
            ),
        ),
        ("effect", Text(f"{found.effect:+.3f} nats a token for it over its opposite, on {found.held} examples")),
    ]
    curve = table("factor>", "mean KL>", "p95 KL>", "effect>", "", title="the curve")
    for point in found.curve:
        mark = "chosen" if point.factor == found.factor else ""
        curve.add_row(
            f"{point.factor:.3f}", f"{point.mean_kl:.4f}", f"{point.p95_kl:.4f}", f"{point.effect:+.3f}", mark
        )
    parts: list[RenderableType] = [grid(rows), Text(), curve]
    if found.layers:
        tried = table("layer>", "factor>", "mean KL>", "p95 KL>", "effect>", "per nat>", "", title="layers tried")
        for each in found.layers:
            tried.add_row(
                str(each.layer),
                f"{each.factor:.3f}",
                f"{each.mean_kl:.3f}",
                f"{each.p95_kl:.3f}",
                f"{each.effect:+.3f}",
                f"{each.per_nat:+.2f}",
                "chosen" if each.layer == found.layer else "",
            )
        parts += [Text(), tried]
    return Group(*parts)


def _side_by_side(prompt: str, without: str, steered: str) -> RenderableType:
    shown = table("without", "with", title=Text(prompt))
    shown.add_row(Text(without), Text(steered, style="green"))
    return shown
