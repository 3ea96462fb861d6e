"""How many changes were on, over time, as a drawing that takes the page's colours.

Owns the drawing and its description in words. Knows nothing of where the moments come from.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime

from nicegui import ui

from liveweight.versions import Moment
from liveweight.web.parts import counted, tag, when

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 180, 34, 26, 12


def state_chart(moments: Sequence[Moment]) -> None:
    """A line in steps, each step a change that went on or off."""
    timed = [moment for moment in moments if moment.at is not None]
    if not timed:
        tag("p", "The model is as it came: nothing was changed yet.", "dim")
        return
    last = timed[-1]
    told = f"{counted(len(last.on), 'change is', 'changes are')} on since {when(last.at)}."
    tag("p", f"{told} {counted(len(timed), 'step')} since {when(timed[0].at)} (UTC).", "dim", "small")
    ui.html(_drawing(timed), sanitize=False)


def _drawing(timed: Sequence[Moment]) -> str:
    first, last = _seconds(timed[0].at), _seconds(timed[-1].at)
    span = max(last - first, 1.0)
    most = max(1, *(len(moment.on) for moment in timed))

    def x(moment: Moment) -> float:
        return _LEFT + (_WIDTH - _LEFT - 12) * (_seconds(moment.at) - first) / span

    def y(count: int) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - count / most)

    path, marks = [f"M {_LEFT} {y(0):.1f}"], []
    for moment in timed:
        path.append(f"H {x(moment):.1f} V {y(len(moment.on)):.1f}")
        title = html.escape(f"{moment.said}, {when(moment.at)}: {counted(len(moment.on), 'change')} on")
        where = f'cx="{x(moment):.1f}" cy="{y(len(moment.on)):.1f}"'
        marks.append(f'<circle class="mark" {where} r="3"><title>{title}</title></circle>')
    path.append(f"H {_WIDTH - 6}")
    line = " ".join(path)
    area = f"{line} V {y(0):.1f} Z"
    axis = "".join(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - 6}" y1="{y(count):.1f}" y2="{y(count):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(count) + 4:.1f}" text-anchor="end">{count}</text>'
        for count in sorted({0, most})
    )
    dates = (
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{when(timed[0].at)}</text>'
        f'<text x="{_WIDTH - 6}" y="{_HEIGHT - 6}" text-anchor="end">{when(timed[-1].at)}</text>'
    )
    label = f"Changes that were on over time, at most {most}, now {len(timed[-1].on)}"
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{axis}'
        f'<path class="area" d="{area}"/><path class="line" d="{line}"/>{"".join(marks)}{dates}</svg>'
    )


def _seconds(moment: datetime | None) -> float:
    return 0.0 if moment is None else moment.timestamp()
