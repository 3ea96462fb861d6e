"""The changes: the ledger as a table, one change's report and controls, the state over time, two versions side by side.

Owns the filters and what is chosen (the address says it: `/changes?change=c3`). What is shown comes from the ledger;
nothing here is counted or remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nicegui import ui

from liveweight import versions
from liveweight.errors import InvalidInput, LiveweightError
from liveweight.ledger import parse_id
from liveweight.reports import Change
from liveweight.shown import short
from liveweight.versions import BASE, NOW, Moment
from liveweight.web.change_controls import ChangeControls
from liveweight.web.frame import Frame
from liveweight.web.parts import aside, button, counted, side_by_side, state_pill, tag, tell, when
from liveweight.web.report_view import report_view
from liveweight.web.state_chart import state_chart
from liveweight.web.story import methods_of

_ROWS = 50  # of the table at first
_MOMENTS = 200  # the newest, that can be chosen
_ANY = "any"
_STATES = (_ANY, "active", "off", "undone", "refused", "failed")


@dataclass
class _Filter:
    """What the table shows."""

    text: str = ""
    state: str = _ANY
    method: str = _ANY
    rows: int = _ROWS

    def lets(self, change: Change) -> bool:
        """Whether a change is shown."""
        if self.state not in (_ANY, change.state) or self.method not in (_ANY, change.method):
            return False
        words = " ".join((change.label, change.name, change.question, change.wanted or "", change.made_by)).casefold()
        return self.text.casefold() in words


@dataclass
class _Seen:
    changes: list[Change] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)


class ChangesPage:
    """One open page of changes."""

    def __init__(self, frame: Frame, change: str | None) -> None:
        """Draw it, and follow what happens."""
        self._frame, self._filter, self._seen = frame, _Filter(), _Seen()
        self._chosen = _number(change)
        self._controls: ChangeControls | None = None
        with tag("div", "", "stack", "wide"):
            tag("h1", "Changes")
            tag(
                "p",
                "Everything that was ever changed in the model. Any change can be weakened, switched off or undone.",
                "dim",
            )
            self._detail = tag("section", "", "panel", "stack", aria_label="The chosen change", tabindex="-1")
            self._detail.set_visibility(False)
            self._filters()
            self._table = tag("div", "", "stack")
            with tag("section", "", "stack", aria_label="The model over time"):
                tag("h2", "The model over time")
                self._chart = tag("div", "", "panel")
            self._compare = _Comparison(frame)
        frame.watch(self._read)

    def _filters(self) -> None:
        with tag("div", "", "row", role="search", aria_label="Filter changes"):
            text = ui.input("Find", on_change=self._set_text).props('outlined dense clearable data-first="1"')
            text.style("flex: 2 1 12rem; width: auto")
            state = ui.select(list(_STATES), value=_ANY, label="State", on_change=self._set_state)
            state.props("outlined dense options-dense").style("flex: 1 1 8rem; width: auto")
            self._methods = ui.select([_ANY], value=_ANY, label="Method", on_change=self._set_method)
            self._methods.props("outlined dense options-dense").style("flex: 1 1 8rem; width: auto")

    def _set_text(self, event: object) -> None:
        self._filter.text = str(getattr(event, "value", "") or "").strip()
        self._draw_table()

    def _set_state(self, event: object) -> None:
        self._filter.state = str(getattr(event, "value", _ANY))
        self._draw_table()

    def _set_method(self, event: object) -> None:
        self._filter.method = str(getattr(event, "value", _ANY))
        self._draw_table()

    async def _read(self) -> None:
        self._seen = await aside(self._look)
        options = [_ANY, *methods_of(self._seen.changes)]
        if self._methods.options != options:
            self._methods.set_options(options)
        self._draw_table()
        self._draw_detail()
        self._chart.clear()
        with self._chart:
            state_chart(self._seen.moments)
        self._compare.offer(self._seen.moments[-_MOMENTS:])

    def _look(self) -> _Seen:
        live = self._frame.service.live
        return _Seen(live.changes(), versions.moments(live.history(), live.engine.info.hash))

    # ------------------------------------------------------------------------------------------------- the table

    def _draw_table(self) -> None:
        found = [change for change in reversed(self._seen.changes) if self._filter.lets(change)]
        self._table.clear()
        with self._table:
            tag("p", self._told(len(found)), "dim", "small", role="status")
            if not found:
                return
            with tag("div", "", "scroll", tabindex="0", role="region", aria_label="Table of changes"), tag("table"):
                tag("caption", "Changes, the newest first", "unseen")
                with tag("thead"), tag("tr"):
                    for name in ("Change", "Question", "Wanted", "State", "Strength", "Method", "By", "When (UTC)"):
                        tag("th", name, "number" if name == "Strength" else "", scope="col")
                with tag("tbody"):
                    for change in found[: self._filter.rows]:
                        self._row(change)
            if len(found) > self._filter.rows:
                button(f"Show {min(_ROWS, len(found) - self._filter.rows)} more", self._more)

    def _told(self, found: int) -> str:
        every = len(self._seen.changes)
        if not every:
            return "Nothing was changed yet. Say of an answer in the chat that it is bad, or fix it."
        return f"{counted(every, 'change')}" if found == every else f"{found:,} of {counted(every, 'change')}"

    def _row(self, change: Change) -> None:
        chosen = change.id == self._chosen
        with tag("tr", "", "chosen" if chosen else ""):
            with tag("td"):
                open_ = button(
                    change.label, lambda: self._choose(change.id), "quiet", aria_label=f"Open {change.label}"
                )
                open_.props["aria-pressed"] = str(chosen).lower()
            tag("td", short(change.question, 80), "wrap")
            tag("td", short(change.wanted or ("not that" if change.verdict == "bad" else ""), 60), "wrap")
            with tag("td"):
                state_pill(change.state)
            tag("td", f"{change.strength:g}", "number")
            tag("td", change.method or "")
            tag("td", change.made_by)
            tag("td", when(change.created_at))

    def _more(self) -> None:
        self._filter.rows += _ROWS
        self._draw_table()

    # ------------------------------------------------------------------------------------------------- one change

    def _choose(self, number: int | None) -> None:
        self._chosen = None if number == self._chosen else number
        self._controls = None
        ui.navigate.history.replace("/changes" if self._chosen is None else f"/changes?change=c{self._chosen}")
        self._draw_table()
        self._draw_detail()
        if self._chosen is not None:
            ui.run_javascript(f"liveweight.focus('#c{self._detail.id}')")

    def _draw_detail(self) -> None:
        change = next((each for each in self._seen.changes if each.id == self._chosen), None)
        self._detail.set_visibility(change is not None)
        if change is None:
            return
        if self._controls is not None:
            self._controls.update(change)
            return
        self._detail.clear()
        with self._detail:
            with tag("div", "", "row", "between"):
                tag("h2", short(change.name, 120))
                button("Close", lambda: self._choose(self._chosen), "quiet")
            self._controls = ChangeControls(self._frame, change)
            if change.reason:
                tag("p", change.reason, "note")
            if change.replaced_by:
                tag("p", f"{change.replaced_by} took its place.", "note")
            if change.report is not None:
                report_view(change.report, self._frame.neurons, done=change.state in ("active", "off", "undone"))


class _Comparison:
    """One question put to two versions of the model."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._moments: dict[str, Moment | None] = {}
        with tag("section", "", "stack", aria_label="Two versions side by side"):
            tag("h2", "Two versions side by side")
            tag("p", "Ask any two versions the same question. The model that runs stays as it is.", "dim")
            with tag("div", "", "row"):
                self._left = ui.select({}, label="One").props("outlined dense options-dense")
                self._right = ui.select({}, label="The other").props("outlined dense options-dense")
                for each in (self._left, self._right):
                    each.style("flex: 1 1 14rem; width: auto")
            self._prompt = ui.input("A question").props("outlined dense")
            with tag("div", "", "row"):
                self._ask = button("Ask both", self._run, "primary")
            self._answers = tag("div", "", "stack", aria_live="polite")

    def offer(self, moments: Sequence[Moment]) -> None:
        """The versions that there are."""
        self._moments = {NOW: None, **{str(each.event) if each.event else BASE: each for each in reversed(moments)}}
        names = {key: _name(key, moment) for key, moment in self._moments.items()}
        for select, value in ((self._left, BASE), (self._right, NOW)):
            if select.options != names:
                select.set_options(names, value=select.value if select.value in names else value)

    async def _run(self) -> None:
        if not await self._frame.known():
            return
        chosen = [self._moments.get(str(select.value)) for select in (self._left, self._right)]
        names = [
            _name(str(select.value), moment) for select, moment in zip((self._left, self._right), chosen, strict=True)
        ]
        self._ask.props["disabled"] = True
        self._answers.clear()
        with self._answers:
            tag("p", "Asking both…", "dim")
        prompt = str(self._prompt.value or "")
        try:
            left, right = await aside(versions.answers, self._frame.service.live, prompt, chosen)
        except LiveweightError as error:
            self._answers.clear()
            tell(f"{error.message} {error.hint}".strip(), "negative")
            return
        finally:
            self._ask.props.pop("disabled", None)
        self._answers.clear()
        with self._answers:
            side_by_side((names[0], left), (names[1], right))


def _name(key: str, moment: Moment | None) -> str:
    if moment is None:
        return "as it is now"
    if key == BASE:
        return "the base model, no change"
    return f"{short(moment.said, 60)}, {when(moment.at)}"


def _number(change: str | None) -> int | None:
    """The change that an address names, None where it names none."""
    if not change:
        return None
    try:
        return parse_id(change, "c")
    except InvalidInput:
        return None
