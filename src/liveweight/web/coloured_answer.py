"""An answer whose tokens are coloured by the neurons that pushed them.

Owns which neurons belong to which token, and how that is shown. What pushed what is measured by `live.why`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liveweight.reports import Reply
from liveweight.tracing import NeuronPush, WhyReport
from liveweight.web.frame import Frame
from liveweight.web.parts import aside, tag

_NEURONS = 200  # on each side, of which each token shows its own
_UNFINISHED = "\ufffd"  # what a tokenizer makes of a part of a character
_SHOWN = 6  # of a token


@dataclass(frozen=True)
class PushedToken:
    """A token of the answer and the neurons that pushed it most, strongest first."""

    text: str  # empty where the token ends no character, or is not shown
    probability: float
    rival: str | None
    pushed: tuple[NeuronPush, ...]

    @property
    def push(self) -> float:
        """Nats, of the neurons that are listed."""
        return sum(each.push for each in self.pushed)


def pushed_tokens(report: WhyReport, prompt_length: int, decode: Callable[[list[int]], str]) -> list[PushedToken]:
    """Each token of an answer with its own neurons: those whose strongest push went out from the token before it.

    The texts, put together, are what `decode` makes of the whole answer.
    """
    texts = token_texts([token.id for token in report.tokens], decode)
    rows: list[list[NeuronPush]] = [[] for _ in report.tokens]
    for each in report.pushed:
        row = each.position - (prompt_length - 1)
        if 0 <= row < len(rows):
            rows[row].append(each)
    return [
        PushedToken(text, token.probability, token.rival, tuple(row))
        for text, token, row in zip(texts, report.tokens, rows, strict=True)
    ]


def token_texts(ids: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with its last one."""
    found, so_far = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        whole = end == len(ids) or not text.endswith(_UNFINISHED)
        found.append(text[len(so_far) :] if whole else "")
        so_far = text if whole else so_far
    return found


class ColouredAnswer:
    """The coloured text, and beneath it the neurons of the token that was chosen."""

    def __init__(self, frame: Frame, reply: Reply) -> None:
        """Draws nothing before `read`."""
        self._frame, self._reply = frame, reply
        self._text = tag("div", "", "answer")
        self._about = tag("div", "", "panel", "stack", aria_live="polite")
        self._about.set_visibility(False)

    async def read(self) -> None:
        """Measure and draw. Raises what `live.why` raises."""
        if not await self._frame.known():
            return
        report = await aside(lambda: self._frame.service.live.why(self._reply.id, top=_NEURONS))
        decode = self._frame.service.live.engine.format.decode
        self._draw(pushed_tokens(report, len(self._reply.prompt_token_ids), decode))

    def _draw(self, tokens: Sequence[PushedToken]) -> None:
        most = max((token.push for token in tokens), default=0.0) or 1.0
        self._text.clear()
        with self._text:
            for token in tokens:
                if not token.text:
                    continue
                shade = 0.08 + 0.47 * max(token.push, 0.0) / most if token.pushed else 0.0
                label = f"{token.text.strip() or repr(token.text)}, pushed by {len(token.pushed)} of the neurons listed"
                drawn = tag("button", token.text, "token", type="button", aria_label=label)
                drawn.style(f"background: rgba(var(--heat), {shade:.2f})")
                drawn.on("click", lambda _, token=token: self._tell(token), args=[])
        self._about.set_visibility(True)
        self._about.clear()
        with self._about:
            tag(
                "p", "The darker a word, the more single neurons pushed it. Choose a word to see which.", "dim", "small"
            )

    def _tell(self, token: PushedToken) -> None:
        self._about.clear()
        with self._about:
            rival = f"; the runner-up was “{token.rival.strip()}”" if token.rival else ""
            tag("p", f"“{token.text.strip()}” had a probability of {token.probability:.0%}{rival}.")
            if not token.pushed:
                tag("p", "None of the strongest neurons pushed this word more than others.", "dim")
                return
            with tag("table", "", "plain"):
                with tag("thead"), tag("tr"):
                    for name in ("Neuron", "Makes likelier", "Push, nats"):
                        tag("th", name, "number" if name.startswith("Push") else "", scope="col")
                with tag("tbody"):
                    for each in token.pushed[:_SHOWN]:
                        name = f"{each.layer}:{each.neuron}"
                        label = each.label.text(negative=each.activation < 0) if each.label is not None else ""
                        with tag("tr"):
                            with tag("td"):
                                tag("a", name, href=f"/neurons?neuron={name}", aria_label=f"Neuron {name}")
                            tag("td", label or "no label")
                            tag("td", f"{each.push:+.2f}", "number")
