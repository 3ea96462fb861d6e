"""One super weight's story: where it spikes, and what the model is with it, without it, weaker and stronger.

Owns these measurements, always of the base. Source: Yu et al. 2024, "The Super Weight in Large Language Models"
(arXiv:2411.07191): the down projection's input and output spike in one layer, the residual stream keeps the spike from
there on, and scaling the weight a little changes quality smoothly. Finding and
confirming super weights is `super_weights.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, Entries, State
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, Unsupported
from liveweight.shown import Shown, short, table
from liveweight.tracing.plain_text import counted, loss, windows_of
from liveweight.tracing.super_weights import PROMPT, SuperWeight, find_super_weights
from liveweight.tracing.zero_shot import Task, accuracy

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
TEXTS = ("Summer is hot. Winter is", "The three largest cities of Italy are")  # to go on from
QUESTION = "Why is the sky blue?"
_SAMPLE = 40  # tokens
Progress = Callable[[str, int, int], None]  # what, done, of how many


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerSpike(_Value):
    """The largest |value| of a layer on the prompt, over tokens and dimensions: as it is, and without the weight."""

    layer: int
    down_input: float | None  # None where the layer has experts
    down_output: float | None
    stream: float  # the residual stream behind the layer
    down_input_zeroed: float | None
    down_output_zeroed: float | None
    stream_zeroed: float


class Scaled(_Value):
    """The perplexity with the weight multiplied by a factor."""

    factor: float
    perplexity: float


class Said(_Value):
    """A greedy continuation with the weight and without."""

    prompt: str
    with_it: str
    without_it: str


class TaskAccuracy(_Value):
    """Zero-shot accuracy with the weight and without."""

    task: str
    samples: int
    guessed: float  # the accuracy of always giving the commonest answer
    with_it: float
    without_it: float

    @property
    def error(self) -> float:
        """One standard error of `with_it`."""
        return math.sqrt(self.with_it * (1 - self.with_it) / self.samples)


class SuperWeightReport(_Value, Shown):
    """What one number holds up."""

    model: str
    weight: SuperWeight
    prompt: str
    layers: tuple[LayerSpike, ...]
    tokens: int
    scaled: tuple[Scaled, ...]  # factor 0 is the weight gone, 1 the model as it is
    perplexity_restored: float  # measured after all of these
    restored: bool  # every tensor's bytes are the base's afterwards
    said: tuple[Said, ...]
    accuracies: tuple[TaskAccuracy, ...]  # none where no samples were given

    def __rich__(self) -> RenderableType:
        """The spike, the factors, what is said and what is known."""
        weight = self.weight
        head = Text.assemble((f"{weight.site} [{weight.row}, {weight.column}]", "bold"), f" = {weight.value:.4f}")
        parts: list[RenderableType] = [head, Text(f'largest |value| on "{self.prompt}"'), Text()]
        spikes = table("layer>", "down input>", "output>", "stream>", "without it: input>", "output>", "stream>")
        for each in self._shown_layers():
            numbers = (each.down_input, each.down_output, each.stream)
            zeroed = (each.down_input_zeroed, each.down_output_zeroed, each.stream_zeroed)
            style = "bold" if each.layer == weight.layer else ""
            spikes.add_row(str(each.layer), *map(_number, (*numbers, *zeroed)), style=style)
        scales = table("factor>", "perplexity>", "")
        for point in self.scaled:
            note = {0.0: "gone", 1.0: "as it is"}.get(point.factor, "")
            scales.add_row(f"{point.factor:g}", f"{point.perplexity:,.2f}", note)
        exact = "every bit is the base's again" if self.restored else "THE WEIGHTS ARE NOT THE BASE'S"
        scales.add_row("restored", f"{self.perplexity_restored:,.2f}", exact)
        parts += [spikes, Text(), Text(f"over {self.tokens:,} tokens of plain text"), scales, Text()]
        for each_said in self.said:
            parts.append(Text(each_said.prompt, "bold"))
            parts.append(Text(f"  with it     {short(each_said.with_it, 160)}"))
            parts.append(Text(f"  without it  {short(each_said.without_it, 160)}"))
        if self.accuracies:
            known = table("task", "samples>", "with it>", "without it>", "commonest answer>")
            for task in self.accuracies:
                told = f"{task.with_it:.1%} ± {task.error:.1%}"
                known.add_row(task.task, str(task.samples), told, f"{task.without_it:.1%}", f"{task.guessed:.1%}")
            parts += [Text(), known]
        return Group(*parts)

    def _shown_layers(self) -> list[LayerSpike]:
        """Where it happens, and enough of the rest to see that it lasts."""
        last, here = len(self.layers) - 1, self.weight.layer
        wanted = {0, here - 1, here, here + 1, (here + last) // 2, last - 1, last}
        return [each for place, each in enumerate(self.layers) if place in wanted]

    def picture(self) -> Figure:
        """The largest |value| by layer, with the weight and without, and the perplexity by factor."""
        from plotly.graph_objects import Scatter
        from plotly.subplots import make_subplots

        titles = ("down projection", "residual stream", "perplexity, weight times a factor")
        figure: Figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.09)
        layers = [each.layer for each in self.layers]
        for column, name, field, colour in (
            (1, "input", "down_input", "#2471a3"),
            (1, "output", "down_output", "#c0392b"),
            (2, "stream", "stream", "#1e8449"),
        ):
            for suffix, dash, more in (("", "solid", ""), ("_zeroed", "dot", ", weight 0")):
                values = [getattr(each, field + suffix) for each in self.layers]
                line = {"color": colour, "dash": dash}
                trace = Scatter(x=layers, y=values, name=name + more, mode="lines+markers", line=line)
                figure.add_trace(trace, row=1, col=column)
        points = Scatter(
            x=[point.factor for point in self.scaled],
            y=[point.perplexity for point in self.scaled],
            name="perplexity",
            mode="lines+markers",
            line={"color": "#6c3483"},
        )
        figure.add_trace(points, row=1, col=3)
        for column in (1, 2):
            figure.update_xaxes(title_text="layer", row=1, col=column)
            figure.add_vline(x=self.weight.layer, line_dash="dash", line_color="#888", row=1, col=column)
        figure.update_yaxes(title_text="largest |value|", type="log", row=1, col=1)
        figure.update_yaxes(type="log", row=1, col=2)
        figure.update_xaxes(title_text="factor", row=1, col=3)
        figure.update_yaxes(type="log", row=1, col=3)
        weight = self.weight
        figure.update_layout(
            title=f"{self.model}: {weight.site} [{weight.row}, {weight.column}]",
            legend={"orientation": "h", "y": -0.18},
        )
        return figure


def super_weight_report(
    engine: TransformersEngine,
    *,
    number: int = 0,
    tasks: Sequence[Task] = (),
    text: str | None = None,
    tokens: int = 1280,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> SuperWeightReport:
    """The story of the confirmed super weight `number`, the most damaging being 0, in the base model.

    Perplexity is over the first `tokens` tokens of `text` (None: the text that ships). The engine's state is as before
    afterwards. Raises Unsupported where no super weight is confirmed, InvalidInput for a number or text that is none.
    """
    confirmed = find_super_weights(engine, cache_dir).confirmed
    if not confirmed:
        raise Unsupported(
            f"No super weight of {engine.info.name} is confirmed, so there is nothing to tell.",
            hint="`super-weights` without --report shows every candidate and what was measured.",
        )
    if not 0 <= number < len(confirmed):
        raise InvalidInput(f"There is no super weight {number}.", hint=f"They are 0 to {len(confirmed) - 1}.")
    weight = confirmed[number]
    windows = windows_of(engine, text, tokens=tokens)
    with engine.preview(()):
        before = engine.fingerprints()
    gone = _times(weight, 0.0)
    points = []
    for place, factor in enumerate((*FACTORS, 1.0)):  # once more as it is, in the end
        if progress is not None:
            progress("perplexity", place, len(FACTORS) + 1)
        state = () if factor == 1.0 else _times(weight, factor)
        nats = sum(loss(engine, window, state) for window in windows)
        points.append(Scaled(factor=factor, perplexity=math.exp(nats / counted(windows))))
    if progress is not None:
        progress("samples", 0, 1)
    said = _said(engine, gone)
    accuracies, done = [], 0
    total = 2 * sum(len(task.samples) for task in tasks)

    def one_more() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("accuracy", done, total)

    for task in tasks:
        found = [accuracy(engine, task.samples, state, one_more) for state in ((), gone)]
        accuracies.append(
            TaskAccuracy(
                task=task.name,
                samples=len(task.samples),
                guessed=task.guessed,
                with_it=found[0],
                without_it=found[1],
            )
        )
    spikes = _spikes(engine, gone)
    with engine.preview(()):
        restored = engine.fingerprints() == before
    return SuperWeightReport(
        model=engine.info.name,
        weight=weight,
        prompt=PROMPT,
        layers=spikes,
        tokens=counted(windows),
        scaled=tuple(points[:-1]),
        perplexity_restored=points[-1].perplexity,
        restored=restored,
        said=said,
        accuracies=tuple(accuracies),
    )


def _times(weight: SuperWeight, factor: float) -> State:
    """The base with the weight multiplied."""
    place = torch.tensor([[weight.row, weight.column]])
    op = Entries(site=weight.site, indices=place, values=torch.tensor([factor * weight.value]))
    return (Active(Adjustment(name=f"{weight.site} times {factor:g}", method="super weights", ops=(op,))),)


def _spikes(engine: TransformersEngine, gone: State) -> tuple[LayerSpike, ...]:
    with_it, without_it = _largest(engine, ()), _largest(engine, gone)
    found = []
    for layer, (one, other) in enumerate(zip(with_it, without_it, strict=True)):
        found.append(
            LayerSpike(
                layer=layer,
                down_input=one[0],
                down_output=one[1],
                stream=one[2],
                down_input_zeroed=other[0],
                down_output_zeroed=other[1],
                stream_zeroed=other[2],
            )
        )
    return tuple(found)


def _largest(engine: TransformersEngine, state: State) -> list[tuple[float | None, float | None, float]]:
    """A layer: the largest |value| of the down projection's input and output and of the stream behind the layer.

    Of a layer with experts only the stream is read.
    """
    dense = [layer for layer in range(engine.sites.layers) if not engine.sites.experts_of(layer)]
    sites = [f"layers.{layer}.resid" for layer in range(engine.sites.layers)]
    ids = engine.format.encode_text(PROMPT, special=True)
    found: list[tuple[float | None, float | None, float]] = []
    with engine.preview(state):
        trace = engine.trace(ids, [*sites, *(f"layers.{layer}.mlp.neurons" for layer in dense)])
        for layer, site in enumerate(sites):
            read, written = None, None
            if layer in dense:
                neurons = trace.values[f"layers.{layer}.mlp.neurons"]
                down = engine.sites.weight(f"layers.{layer}.mlp.down.weight").read().float().cpu()
                read, written = _top(neurons), _top(neurons @ down.T)
            found.append((read, written, _top(trace.values[site])))
    return found


def _number(value: float | None) -> str:
    return "experts" if value is None else f"{value:,.1f}"


def _top(values: Tensor) -> float:
    return float(values.abs().max())


def _said(engine: TransformersEngine, gone: State) -> tuple[Said, ...]:
    """What the model says with the weight and without, greedily."""
    prompts = [(text, engine.format.encode_text(text, special=True)) for text in TEXTS]
    if engine.format.has_template:
        prompts.append((QUESTION, engine.encode([Message("user", QUESTION)])))
    answers: list[list[str]] = []
    for state in ((), gone):
        said = []
        for _, ids in prompts:
            with engine.preview(state):
                (row,) = engine.greedy([ids], _SAMPLE)
            said.append(engine.format.decode([token for token in row if token not in engine.format.end_tokens]).strip())
        answers.append(said)
    pairs = zip(prompts, *answers, strict=True)
    return tuple(Said(prompt=prompt, with_it=one, without_it=other) for (prompt, _), one, other in pairs)
