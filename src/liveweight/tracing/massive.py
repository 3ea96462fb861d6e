"""Massive activations: the few values that are thousands of times larger than all others.

Owns finding them on a text, under the present weights: a value is massive where its magnitude exceeds 100 and also
1,000 times the median magnitude of its site's values in the same piece of text. Source: Sun et al. 2024, "Massive
Activations in Large Language Models" (arXiv:2402.17762), section 2, where a site is the hidden state behind a layer;
here it is every activation that has a name (the stream, the heads' outputs, the neurons, what the unembedding reads).
Knows nothing of which weight makes them: `super_weights.py` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.shown import Shown, quoted, table
from liveweight.tracing.plain_text import LENGTH, window_length

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LARGE = 100.0  # magnitude, at least
TIMES = 1000.0  # the median magnitude of the site, at least
_TOKENS_NAMED = 3  # of each place
_ROWS = 30  # of the table
Progress = Callable[[int, int], None]  # done, of how many


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Where(_Value):
    """One position of a text."""

    window: int  # which piece of the text, from 0 on
    position: int  # in it
    token: str


class MassiveValue(_Value):
    """One dimension of one site that holds massive values."""

    site: str
    layer: int | None  # None for the embeddings and the final norm
    dimension: int
    largest: float  # with its sign
    times: float  # that magnitude over the site's median
    count: int  # positions where it is massive
    first_positions: int  # of these, how many are a window's first
    where: Where  # of the largest
    tokens: tuple[tuple[str, int], ...]  # the commonest tokens there, with how often


class Magnitudes(_Value):
    """The largest magnitudes of a site, each of another dimension, and its median magnitude."""

    site: str
    layer: int | None
    top: tuple[float, ...]  # largest first
    median: float


class Massive(_Value, Shown):
    """The massive activations of a text."""

    model: str
    version: str
    tokens: int
    values: tuple[MassiveValue, ...]  # in the order of a forward pass, the largest of a site first
    sites: tuple[Magnitudes, ...]
    skipped: tuple[str, ...]  # sites of experts, which are not one tensor

    def __rich__(self) -> RenderableType:
        """Where they are and on which tokens."""
        parts: list[RenderableType] = [
            Text(f"|value| above {LARGE:g} and above {TIMES:,.0f} times its site's median, on {self.tokens:,} tokens"),
            Text(),
        ]
        if not self.values:
            nearest = max(self.sites, key=lambda each: each.top[0] / max(each.median, 1e-30))
            parts.append(
                Text(
                    f"None. The nearest is {nearest.site}: {nearest.top[0]:,.1f}, "
                    f"{nearest.top[0] / max(nearest.median, 1e-30):,.0f} times the median."
                )
            )
            return Group(*parts)
        shown = table("layer>", "activation", "dim>", "largest>", "times median>", "positions>", "on the tokens")
        for each in self.values[:_ROWS]:
            named = Text()
            for token, count in each.tokens:
                named.append_text(quoted(token)).append(f" x{count}  " if count > 1 else "  ", style="dim")
            many = f"{each.count} ({each.first_positions} first)"
            layer, part = ("", each.site) if each.layer is None else (str(each.layer), each.site.split(".", 2)[2])
            shown.add_row(layer, part, str(each.dimension), f"{each.largest:,.0f}", f"{each.times:,.0f}", many, named)
        parts.append(shown)
        if len(self.values) > _ROWS:
            parts.append(Text(f"and {len(self.values) - _ROWS} more: see --json", style="dim"))
        return Group(*parts)

    def picture(self) -> Figure:
        """The three largest magnitudes and the median behind each layer, and of each layer's neurons."""
        from plotly.graph_objects import Figure as Made
        from plotly.subplots import make_subplots

        kinds = [("resid", "residual stream behind each layer"), ("mlp.neurons", "neurons of each layer")]
        figure: Made = make_subplots(rows=1, cols=2, subplot_titles=[title for _, title in kinds])
        for column, (kind, _) in enumerate(kinds, start=1):
            rows = [each for each in self.sites if each.layer is not None and each.site.endswith(f".{kind}")]
            _add_magnitudes(figure, rows, column)
        figure.update_xaxes(title_text="layer")
        figure.update_yaxes(type="log", title_text="|value|", col=1)
        figure.update_yaxes(type="log", col=2)
        figure.update_layout(title=f"{self.model}: largest activations on {self.tokens:,} tokens")
        return figure


def _add_magnitudes(figure: Figure, rows: Sequence[Magnitudes], column: int) -> None:
    from plotly.graph_objects import Scatter

    layers = [each.layer for each in rows]
    series = [(f"top {rank + 1}", [each.top[rank] for each in rows if rank < len(each.top)]) for rank in range(3)]
    series.append(("median", [each.median for each in rows]))
    colours = ("#c0392b", "#d68910", "#b7950b", "#5d6d7e")
    for (name, values), colour in zip(series, colours, strict=True):
        line = {"color": colour, "dash": "dot" if name == "median" else "solid"}
        trace = Scatter(x=layers, y=values, name=name, mode="lines+markers", line=line, showlegend=column == 1)
        figure.add_trace(trace, row=1, col=column)
    floor = [max(LARGE, TIMES * each.median) for each in rows]
    line = {"color": "#888", "dash": "dash"}
    threshold = Scatter(x=layers, y=floor, name="counts as massive", mode="lines", line=line, showlegend=column == 1)
    figure.add_trace(threshold, row=1, col=column)


def massive(
    engine: TransformersEngine,
    text: str,
    *,
    chat: bool = False,
    tokens: int = 1280,
    progress: Progress | None = None,
) -> Massive:
    """The massive activations of a text, or of a question in the chat template, under the present weights.

    The first `tokens` tokens are read in windows of 256 (or the model's context), each with the token that a text
    begins with, where the model has one. Raises InvalidInput for an empty text.
    """
    windows = _windows(engine, text, chat, tokens)
    names = [site for site in engine.sites.activation_names() if not site.endswith(".mlp.router")]
    skipped = tuple(
        f"layers.{layer}.mlp.neurons" for layer in range(engine.sites.layers) if engine.sites.experts_of(layer)
    )
    seen = {site: _Seen(site, engine.sites.activation(site).size) for site in names}
    with engine.gate.step():
        state, version = engine.state, str(engine.version)
    for number, ids in enumerate(windows):
        if progress is not None:
            progress(number, len(windows))
        with engine.preview(state):  # all windows under one state, and a running chat waits for one of them only
            values = engine.trace(ids, names).values
        for site in names:
            seen[site].add(number, values[site])
    if progress is not None:
        progress(len(windows), len(windows))
    return Massive(
        model=engine.info.name,
        version=version,
        tokens=sum(map(len, windows)),
        values=tuple(value for site in names for value in seen[site].found(engine, windows)),
        sites=tuple(seen[site].magnitudes() for site in names),
        skipped=skipped,
    )


class _Seen:
    """What was seen at one site: no more of a window than its largest values and its massive ones."""

    def __init__(self, site: str, size: int) -> None:
        self.site = site
        self._most = torch.zeros(size)  # |value| of each dimension over all windows
        self._medians: list[float] = []
        self._massive: dict[int, list[tuple[float, float, int, int]]] = {}  # dimension -> value, times, window, place

    def add(self, window: int, values: Tensor) -> None:
        """The values (T, size) of one window."""
        magnitudes = values.abs()
        median = float(magnitudes.median())
        self._medians.append(median)
        self._most = torch.maximum(self._most, magnitudes.max(0).values)
        for position, dimension in (magnitudes > max(LARGE, TIMES * median)).nonzero().tolist():
            value = float(values[position, dimension])
            entry = (value, abs(value) / max(median, 1e-30), window, position)
            self._massive.setdefault(dimension, []).append(entry)

    def magnitudes(self) -> Magnitudes:
        """The largest of all windows, and the median of their medians."""
        top = self._most.topk(min(3, len(self._most))).values.tolist()
        median = float(torch.tensor(self._medians).median())
        return Magnitudes(site=self.site, layer=_layer(self.site), top=tuple(top), median=median)

    def found(self, engine: TransformersEngine, windows: Sequence[Sequence[int]]) -> list[MassiveValue]:
        """The massive dimensions, the largest first."""

        def token(window: int, position: int) -> str:
            return str(engine.format.tokenizer.decode([windows[window][position]]))

        values = []
        for dimension, entries in self._massive.items():
            largest, times, window, position = max(entries, key=lambda entry: abs(entry[0]))
            said = Counter(token(*entry[2:]) for entry in entries)
            values.append(
                MassiveValue(
                    site=self.site,
                    layer=_layer(self.site),
                    dimension=dimension,
                    largest=largest,
                    times=times,
                    count=len(entries),
                    first_positions=sum(entry[3] == 0 for entry in entries),
                    where=Where(window=window, position=position, token=token(window, position)),
                    tokens=tuple(said.most_common(_TOKENS_NAMED)),
                )
            )
        return sorted(values, key=lambda each: -abs(each.largest))


def _windows(engine: TransformersEngine, text: str, chat: bool, tokens: int) -> list[list[int]]:
    if not text.strip():
        raise InvalidInput("The text is empty, so there is nothing to read.", hint="Give a prompt or a text file.")
    if tokens < 1:
        raise InvalidInput(f"{tokens} tokens cannot be read.", hint="Give one or more.")
    if chat:
        return [engine.encode([Message("user", text)])[:tokens]]
    length = window_length(engine, LENGTH)
    plain: list[int] = []
    for paragraph in text.splitlines(keepends=True):  # tokenizers warn of a text longer than the model's context
        if len(plain) >= tokens:
            break
        plain += engine.format.encode_text(paragraph)
    # What the tokenizer puts before a text, it puts before each window.
    begin = engine.format.before_text
    step = max(1, length - len(begin))
    return [[*begin, *plain[start : min(start + step, tokens)]] for start in range(0, min(len(plain), tokens), step)]


def _layer(site: str) -> int | None:
    return int(site.split(".")[1]) if site.startswith("layers.") else None
