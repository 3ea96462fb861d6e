"""The neurons: find them by the words of their labels, read one's page, hold it at a value and see what is said.

Owns what is asked for (the address says it: `/neurons?neuron=20:1114` or `/neurons?find=river`). Reading is done by
jobs, so that it shows its progress, can be cancelled, and is found again after a reload.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from nicegui import ui

from liveweight.errors import InvalidInput, LiveweightError
from liveweight.tracing.atlas import NeuronHits
from liveweight.tracing.clamping import Clamped, parse_clamps, parse_neuron
from liveweight.tracing.neuron_page import NeuronPage, Place
from liveweight.web.frame import Frame
from liveweight.web.parts import aside, button, counted, drawing, side_by_side, table, tag, tell
from liveweight.web.work_view import WorkView

_TOP = 30
_PLACES = 5
_SIDES = {
    "promotes": "makes likelier",
    "suppresses": "makes less likely",
    "gate": "is opened by",
    "up": "reads",
}


class NeuronsPage:
    """One open page of neurons."""

    def __init__(self, frame: Frame, find: str | None, neuron: str | None) -> None:
        """Draw it; `find` and `neuron` are what the address asks for."""
        self._frame = frame
        with tag("div", "", "stack", "wide"):
            tag("h1", "Neurons")
            tag(
                "p",
                "A model is made of many small detectors. Each one has a label here: the words that it makes likelier."
                " A label is read off the weights and is a hint, not a meaning; many neurons do several things.",
                "dim",
            )
            self._search_form(find or "")
            self._hits = WorkView(frame, "neurons", self._show_hits)
            self._page_form(neuron or "")
            self._page = WorkView(frame, "neuron", self._show_page)
            _Clamps(frame, neuron or "")
        frame.watch(self._nothing)
        if find:
            self._hits.about(find)
        if neuron and not self._page.about(neuron):
            ui.timer(0.0, self._read, once=True)

    async def _nothing(self) -> None:
        """What the page shows does not change with the ledger."""

    def _search_form(self, find: str) -> None:
        with tag("div", "", "row", role="search", aria_label="Search labels"):
            self._find = ui.input("A word, such as river", value=find).props('outlined dense data-first="1"')
            self._find.style("flex: 1 1 14rem; width: auto").on("keydown.enter", self._search, args=[])
            button("Search labels", self._search, "primary")
        tag(
            "p",
            "The first search labels every neuron of the model, which can take minutes; then labels are kept.",
            "dim",
            "small",
        )

    def _page_form(self, neuron: str) -> None:
        tag("h2", "One neuron")
        with tag("div", "", "row"):
            self._which = ui.input("Layer:neuron, such as 20:1114", value=neuron).props("outlined dense")
            self._which.style("flex: 1 1 14rem; width: auto").on("keydown.enter", self._read, args=[])
            button("Read it", self._read, "primary")

    async def _search(self) -> None:
        word = str(self._find.value or "").strip()
        if not word:
            tell("Type a word to look for.", "warning")
            return
        ui.navigate.history.replace(f"/neurons?find={quote(word)}")
        await self._hits.send(word, {"find": word, "how": "text", "top": _TOP})

    async def _read(self) -> None:
        which = str(self._which.value or "").strip()
        try:
            layer, index = parse_neuron(which)
            self._frame.service.live.engine.sites.check_neurons(layer, (index,))
        except LiveweightError as error:
            tell(f"{error.message} {error.hint}".strip(), "negative")
            return
        name = f"{layer}:{index}"
        ui.navigate.history.replace(f"/neurons?neuron={name}")
        await self._page.send(name, {"neuron": name})

    def _show_hits(self, result: Mapping[str, Any]) -> None:
        hits = NeuronHits.model_validate(result["neurons"])
        if not hits.hits:
            tag("p", f"No neuron has {hits.looked_for} among its words.")
            return
        tag("p", f"{counted(hits.found, 'label')} with {hits.looked_for}; the surest {len(hits.hits)}:", "dim", "small")
        with tag("div", "", "scroll", tabindex="0", role="region", aria_label="Neurons found"), tag("table"):
            with tag("thead"), tag("tr"):
                for name in ("Neuron", "What it does", "Words", "Probability"):
                    tag("th", name, "number" if name == "Probability" else "", scope="col")
            with tag("tbody"):
                for hit in hits.hits:
                    name, side, probability, words = hit.line()
                    with tag("tr"):
                        with tag("td"):
                            tag("a", name, href=f"/neurons?neuron={name}", aria_label=f"Neuron {name}")
                        tag("td", _SIDES.get(side, side))
                        tag("td", words, "wrap")
                        tag("td", probability, "number")

    def _show_page(self, result: Mapping[str, Any]) -> None:
        page = NeuronPage.model_validate(result["neuron"])
        label = page.label
        tag("h3", f"Neuron {label.name}")
        rows = [
            (_SIDES.get(side, side), label.side(side).text(8), f"{label.side(side).top[0].probability:.3f}")
            for side in ("promotes", "suppresses", *label.reads)
        ]
        table(("Side", "Words", "Probability of the first"), rows, "The neuron's labels", numbers=(2,))
        tag(
            "p",
            f"Over {counted(page.tokens_read, 'word piece')} of text it is above zero at {page.positive:.1%}; its mean"
            f" is {page.mean:.3f}, its spread {page.deviation:.3f}.",
            "dim",
        )
        for title, places in (("Where it is strongest", page.strongest), ("Where it is most negative", page.lowest)):
            if places:
                tag("h3", title, "minor")
                for place in places[:_PLACES]:
                    _place(place)
        for kind, neighbours in page.neighbours.items():
            with tag("details"):
                tag("summary", f"Neurons that {'write' if kind == 'write' else 'read'} alike ({kind})")
                alike = [(f"{each.layer}:{each.neuron}", each.text, f"{each.cosine:+.2f}") for each in neighbours]
                table(("Neuron", "Makes likelier", "Cosine"), alike, f"Alike in {kind}", numbers=(2,))
        tag("h3", "What is said next while it is held at a value")
        points = [(f"{p.value:.2f}", f"{p.promoted:.2e}", f"{p.suppressed:.2e}") for p in page.curve.points]
        names = ("Held at", repr(page.curve.promoted), repr(page.curve.suppressed))
        drawing(page.picture(), "Probability of the next word piece over the value; its figures follow")
        with tag("details"):
            tag("summary", "The figures")
            table(names, points, "Probability of the next word piece", numbers=(0, 1, 2))


class _Clamps:
    """Hold neurons at values and compare what is said."""

    def __init__(self, frame: Frame, neuron: str) -> None:
        self._frame = frame
        self._values: dict[tuple[int, int], float] = {}
        with tag("section", "", "stack", aria_label="Hold neurons at values"):
            tag("h2", "Hold it and see")
            tag("p", "Force neurons to a value while the model answers. Nothing stays, unless you keep it.", "dim")
            with tag("div", "", "row"):
                self._clamps = ui.input("Such as 20:1114=8", value=f"{neuron}=8" if neuron else "").props(
                    "outlined dense"
                )
                self._prompt = ui.input("A question").props("outlined dense")
                for each in (self._clamps, self._prompt):
                    each.style("flex: 1 1 14rem; width: auto")
            with tag("div", "", "row"):
                self._try = button("Try", self._run, "primary")
            self._shown = tag("div", "", "stack", aria_live="polite")

    async def _run(self) -> None:
        if await self._frame.allowed() is None:
            return
        live = self._frame.service.live
        prompt = str(self._prompt.value or "")
        self._try.props["disabled"] = True
        try:
            self._values = parse_clamps(str(self._clamps.value or "").replace(",", " ").split())
            if not self._values:
                raise InvalidInput("No neuron is named.", hint="Write LAYER:NEURON=VALUE, such as 20:1114=8.")
            found = await aside(lambda: live.clamp(self._values, prompt))
        except LiveweightError as error:
            tell(f"{error.message} {error.hint}".strip(), "negative")
            return
        finally:
            self._try.props.pop("disabled", None)
        self._shown.clear()
        with self._shown:
            self._draw(found)

    def _draw(self, found: Clamped) -> None:
        side_by_side(("As it is", found.before), ("With the neurons held", found.after))
        rows = [
            (
                f"{each.layer}:{each.neuron}",
                f"{each.value:g}",
                each.token.text,
                f"{each.before:.2e}",
                f"{each.after:.2e}",
            )
            for each in found.neurons
        ]
        names = ("Neuron", "Held at", "Its word", "Probability", "Held")
        table(names, rows, "Neurons that are held", numbers=(1, 3, 4))
        tag("p", f"The next word piece shifts by {found.next.kl:.3f} nats.", "dim")
        if self._frame.may_change:
            with tag("div", "", "row"):
                button("Keep it as a change", self._keep, title="If the guard lets it")

    async def _keep(self) -> None:
        live, values, prompt = self._frame.service.live, dict(self._values), str(self._prompt.value or "")
        tell("Measuring what else would change…", "info")
        change = await self._frame.act(lambda: live.apply(live.clamping(values), prompt=prompt))
        if change is not None:
            tell(f"Kept as {change.label}. It can be switched off or undone under Changes.")


def _place(place: Place) -> None:
    strong = abs(place.activation) or 1.0
    with tag("p", "", "said", "small"):
        tag("span", f"{place.activation:+.2f} ", "dim", "number")
        for number, (token, value) in enumerate(zip(place.tokens, place.activations, strict=True)):
            shown = tag("strong" if number == place.at else "span", token.replace("\n", "⏎"))
            shown.style(f"background: rgba(var(--heat), {0.45 * min(1.0, abs(value) / strong):.2f})")
