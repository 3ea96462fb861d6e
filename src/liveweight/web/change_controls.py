"""A change's strength, off, on and undo, wherever the change is shown.

Owns these controls. What they do is carried out by the model in a worker thread, in the visitor's name.
"""

from __future__ import annotations

from nicegui import ui
from nicegui.events import GenericEventArguments

from liveweight.reports import Change
from liveweight.web.frame import Frame
from liveweight.web.parts import button, enable, in_page, state_pill, tag, tell

MOST = 2.0  # of the slider; 1 is as proposed


class ChangeControls:
    """The row of controls of one change; `update` it when the change is another."""

    def __init__(self, frame: Frame, change: Change) -> None:
        """Draw them for a change as it is now."""
        self._frame, self._change = frame, change
        self._wished = change.strength
        self._shown: float | None = None  # where the slider stands
        with tag("div", "", "stack", role="group", aria_label=f"Change {change.label}"):
            with tag("div", "", "row"):
                tag("a", change.label, "strong", href=f"/changes?change={change.label}")
                self._state = tag("span", "")
            self._row = tag("div", "", "strength")
            with self._row:
                tag("span", "Strength", "dim", aria_hidden="true")
                self._slider = tag(
                    "input",
                    type="range",
                    min="0",
                    max=f"{MOST:g}",
                    step="0.05",
                    aria_label=f"Strength of {change.label}",
                )
                self._slider.on("input", self._slid, js_handler="(event) => emit(event.target.value)")
                self._slider.on("change", in_page(self._move), args=[])
                self._value = tag("output", "", "number")
            with tag("div", "", "row"):
                self._off = button("Switch off", self._switch_off, title="The model is then as without it")
                self._on = button("Switch on", self._switch_on)
                self._undo = button("Undo", self._take_back, "danger", title="Take it back for good")
        self.update(change)

    def update(self, change: Change) -> None:
        """Show the change as it is now."""
        self._change = change
        self._state.clear()
        with self._state:
            state_pill(change.state)
        here = change.state in ("active", "off")
        for element, shown in (
            (self._off, change.state == "active"),
            (self._on, change.state == "off"),
            (self._undo, here),
        ):
            element.set_visibility(shown)
            enable(element, self._frame.may_change)
        self._row.set_visibility(here)
        enable(self._slider, self._frame.may_change)
        if self._shown != change.strength:
            self._shown = self._wished = change.strength
            ui.run_javascript(f"liveweight.range({self._slider.id}, {change.strength})")
        self._value.text = f"{change.strength:.2f}"

    def _slid(self, event: GenericEventArguments) -> None:
        self._wished = float(event.args)
        self._value.text = f"{self._wished:.2f}"

    async def _move(self) -> None:
        self._shown = wished = self._wished
        if wished != self._change.strength:
            await self._done(await self._frame.act(self._frame.service.live.set_strength, self._change.label, wished))

    async def _switch_off(self) -> None:
        await self._done(await self._frame.act(self._frame.service.live.off, self._change.label))

    async def _switch_on(self) -> None:
        await self._done(await self._frame.act(self._frame.service.live.on, self._change.label))

    async def _take_back(self) -> None:
        await self._done(await self._frame.act(self._frame.service.live.undo, self._change.label))

    async def _done(self, changed: Change | None) -> None:
        self.update(self._change if changed is None else changed)
        if changed is not None:
            at = f" at strength {changed.strength:g}" if changed.state == "active" and changed.strength != 1.0 else ""
            tell(f"{changed.label} is {'on' if changed.state == 'active' else changed.state}{at}.")
