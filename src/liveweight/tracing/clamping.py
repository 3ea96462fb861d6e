"""Neurons held at values: the answer and the next token side by side, without and with it; and the curve over values.

Owns the grammar of a clamp (`20:1114=8`), the comparison, and the curve. Nothing stays in the model: clamps are
previews, and what is to be kept is an adjustment for `LiveModel.apply`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.text import Text

from liveweight.adjustments import Active, Adjustment, Clamp
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.shown import Shown, quoted, table
from liveweight.tracing.capture import Neuron, require_dense
from liveweight.tracing.neuron_labels import TokenGuess, label_neurons
from liveweight.tracing.stepping import Ending, Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_NEURON = re.compile(r"^\s*(\d+)\s*:\s*(\d+)\s*$")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClampedNeuron(_Value):
    """One neuron that is held, and what that does to the token that it writes most."""

    layer: int
    neuron: int
    value: float
    token: TokenGuess  # that its label names for this sign; with its probability as the label has it
    before: float  # the token's probability as the next one, without any clamp
    after: float  # and with all of them


class Clamped(_Value, Shown):
    """A prompt with neurons held at values, and without."""

    model: str
    version: str
    prompt: str
    neurons: tuple[ClampedNeuron, ...]
    next: Ending
    before: str  # the greedy answer
    after: str

    def __rich__(self) -> RenderableType:
        """Neurons, next tokens, answers."""
        held = table("neuron", "held at>", "writes", "its probability>", "clamped>")
        for each in self.neurons:
            name = Text(f"{each.layer}:{each.neuron}", "bold")
            cells = (quoted(each.token.text), f"{each.before:.2e}", f"{each.after:.2e}")
            held.add_row(name, f"{each.value:g}", *cells)
        following = table("next token", "probability>", "clamped", "probability>")
        for old, new in zip(self.next.before[:5], self.next.after[:5], strict=True):
            both = [(quoted(each.text), f"{each.probability:.3f}") for each in (old, new)]
            following.add_row(*both[0], *both[1])
        answers = table("default", "clamped")
        answers.add_row(Text(self.before), Text(self.after))
        return Group(held, Text(), following, Text(f"KL {self.next.kl:.4f} nats", "dim"), Text(), answers)


class ClampPoint(_Value):
    """The next token's probabilities while one neuron is held at a value."""

    value: float
    promoted: float
    suppressed: float


class ClampCurve(_Value):
    """How likely the tokens that a neuron writes become, as the next one, over the values that it is held at."""

    layer: int
    neuron: int
    prompts: int  # over which probabilities are averaged
    own: float  # the neuron's own activation at the prompts' ends, mean
    promoted: str  # the token that it writes most
    suppressed: str  # and most against; for negative values it is the other way round
    unclamped: ClampPoint  # nothing is held; its `value` is `own`
    points: tuple[ClampPoint, ...]

    def picture(self) -> Figure:
        """Both tokens' probabilities over the held value."""
        from plotly import graph_objects

        figure = graph_objects.Figure()
        for name, field in ((self.promoted, "promoted"), (self.suppressed, "suppressed")):
            y = [getattr(point, field) for point in self.points]
            figure.add_scatter(x=[point.value for point in self.points], y=y, mode="lines+markers", name=repr(name))
        figure.add_vline(x=self.own, line_dash="dot", annotation_text="its own activation")
        figure.update_layout(
            title=f"Neuron {self.layer}:{self.neuron} held at a value",
            xaxis_title="activation",
            yaxis={"title": "probability of the next token", "type": "log", "exponentformat": "power"},
            template="plotly_white",
        )
        return figure


def parse_neuron(text: str) -> Neuron:
    """`20:1114` as (layer, neuron). Raises InvalidInput."""
    found = _NEURON.match(text)
    if found is None:
        raise InvalidInput(f"{text!r} names no neuron.", hint="Write LAYER:NEURON, such as 20:1114.")
    return int(found[1]), int(found[2])


def parse_clamps(texts: Sequence[str]) -> dict[Neuron, float]:
    """`20:1114=8` and its like. Raises InvalidInput for what is no clamp, or for a neuron that is held twice."""
    found: dict[Neuron, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        neuron = parse_neuron(name)
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not equals or not torch.isfinite(torch.tensor(number)):
            raise InvalidInput(f"{text!r} is no clamp.", hint="Write LAYER:NEURON=VALUE, such as 20:1114=8.")
        if neuron in found:
            raise InvalidInput(f"{name.strip()} is held twice.", hint="Give each neuron one value.")
        found[neuron] = number
    return found


def clamp(
    engine: TransformersEngine,
    values: Mapping[Neuron, float],
    prompt: Sequence[int],
    *,
    question: str = "",
    max_tokens: int = 40,
    cache_dir: Path | None = None,
) -> Clamped:
    """Answer a prompt (token ids) with neurons held at values at every position, and without.

    On top of the present state. Raises InvalidInput where nothing is held or the prompt is empty, UnknownSite for a
    neuron that is not there, Unsupported for a model with experts.
    """
    require_dense(engine)
    if len(prompt) < 2:
        raise InvalidInput("A text of one token is too short to clamp in.", hint="Give two words or more.")
    clamps = adjustment(engine, values)
    labels = label_neurons(engine, values, cache_dir=cache_dir)
    with Run(engine, prompt, question=question, cache_dir=cache_dir) as run:
        for op in clamps.ops:
            assert isinstance(op, Clamp)
            run.until(f"layers.{op.layer}.mlp.neurons")
            run.clamp(dict(zip(op.neurons, op.values.tolist(), strict=True)))
        ending = run.finish()
        texts = [run.generate(max_tokens, edited=edited) for edited in (False, True)] if max_tokens else ["", ""]
        chances = [_next(engine, [prompt], state)[0] for state in (engine.state, run.state)]
    held = []
    for (layer, neuron), value in values.items():
        label = labels[layer, neuron]
        token = (label.promotes if value >= 0 else label.suppresses).top[0]
        before, after = (float(each[token.id]) for each in chances)
        held.append(
            ClampedNeuron(layer=layer, neuron=neuron, value=value, token=token, before=before, after=after),
        )
    return Clamped(
        model=engine.info.name,
        version=str(engine.version),
        prompt=question or engine.format.decode(prompt),
        neurons=tuple(held),
        next=ending,
        before=texts[0],
        after=texts[1],
    )


def adjustment(engine: TransformersEngine, values: Mapping[Neuron, float], name: str = "") -> Adjustment:
    """Neurons held at values as an adjustment. Raises InvalidInput where nothing is held, UnknownSite."""
    if not values:
        raise InvalidInput("No neuron is held.", hint="Give one or more, such as 20:1114=8.")
    layers: dict[int, list[int]] = {}
    for layer, neuron in sorted(values):
        engine.sites.check_neurons(layer, (neuron,))
        layers.setdefault(layer, []).append(neuron)
    told = ", ".join(f"{layer}:{neuron}={value:g}" for (layer, neuron), value in values.items())
    return Adjustment(
        name=name or f"clamp {told}",
        method="clamp",
        ops=tuple(
            Clamp(layer=layer, neurons=tuple(neurons), values=torch.tensor([values[layer, each] for each in neurons]))
            for layer, neurons in layers.items()
        ),
        note=f"{len(values)} neuron{'s' * (len(values) > 1)} held, at every position.",
    )


def clamp_curve(
    engine: TransformersEngine,
    neuron: Neuron,
    prompts: Sequence[Sequence[int]],
    values: Sequence[float],
    *,
    cache_dir: Path | None = None,
) -> ClampCurve:
    """Hold one neuron at each of `values` in turn, and average the next token's probabilities over prompts (ids).

    One forward pass a value. Raises as `clamp` does.
    """
    layer, index = neuron
    if not prompts or not all(prompts):
        raise InvalidInput("There is no prompt to clamp in.", hint="Give some text.")
    label = label_neurons(engine, [neuron], cache_dir=cache_dir)[neuron]
    tokens = [label.promotes.top[0].id, label.suppresses.top[0].id]
    site = f"layers.{layer}.mlp.neurons"
    own = torch.stack([engine.trace(prompt, [site]).values[site][-1, index] for prompt in prompts]).mean()

    def point(value: float, held: bool) -> ClampPoint:
        extra = (Active(adjustment(engine, {neuron: value})),) if held else ()
        promoted, suppressed = _next(engine, prompts, (*engine.state, *extra))[:, tokens].mean(0).tolist()
        return ClampPoint(value=value, promoted=promoted, suppressed=suppressed)

    return ClampCurve(
        layer=layer,
        neuron=index,
        prompts=len(prompts),
        own=float(own),
        promoted=label.promotes.top[0].text,
        suppressed=label.suppresses.top[0].text,
        unclamped=point(float(own), False),
        points=tuple(point(value, True) for value in values),
    )


def _next(engine: TransformersEngine, prompts: Sequence[Sequence[int]], state: tuple[Active, ...]) -> torch.Tensor:
    """The next token's probabilities (n, vocabulary) behind prompts of two tokens or more, under a state."""
    with engine.preview(state), torch.inference_mode():
        replay = engine.record(prompts, [len(prompt) - 1 for prompt in prompts])
        return engine.unembed(replay.final[:, 0]).float().softmax(-1).cpu()
