"""steer: a direction in the residual stream, added at every token.

Owns finding the direction (difference of means, after Rimsky et al., "Steering Llama 2 via Contrastive Activation
Addition", ACL 2024; first principal component of paired differences, after Zou et al., "Representation Engineering",
2023; one prompt minus another, after Turner et al., "Activation Addition", 2023; tuned on pairs, after Cao et al.,
"Personalized Steering of Large Language Models", NeurIPS 2024), choosing the layer, and what is told of it. How strong
it may be is found in `calibration.py`; what a person puts side by side becomes tokens in `sides.py`.

A direction is read where the difference is: over the answer's own tokens where the examples hold answers (their mean),
for that is where the model is in the middle of saying the one or the other; else at the prompt's last token, behind
which the model begins its answer. It is added at every token, so that a steering does not depend on how long a prompt
is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from liveweight.adjustments import Adjustment, Steer
from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoMendFound
from liveweight.methods.base import Case, Context
from liveweight.methods.calibration import Measure, Point, Rows, calibrate, kl_between, summed_up
from liveweight.methods.sides import Example, Sides
from liveweight.methods.trials import chosen_contexts, named, no_mend, outcome, parting, works
from liveweight.settings import MethodSettings

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

T = TypeVar("T")
How = Literal["mean", "pca", "pair", "tuned"]

TOLERANCE = 0.1  # of the target, within which a KL counts as reached
_AIM = 0.05  # where the search stops
_TRIALS = 14  # of a factor, at most
_ROUGH, _ROUGH_TRIALS = 0.25, 5  # the same while layers are compared
_DEPTHS = (0.2, 0.85)  # where directions are looked for: before, tokens are being read; behind, the answer is settled
_TUNED_DEPTHS = (0.3, 0.5)  # a direction that is trained works through the layers behind it
_LAYERS = 10  # of them at most, evenly spread
_FEW = 24  # neutral prompts that layers are compared on
_JUDGED = 32  # examples of a side that the effect is measured on
_READ = 32  # examples that are read at once
_ANSWER = 8  # tokens of the model's own answers, where examples bring none
_FIRST = 0.25  # the first factor tried: this share of the stream's own length
_SHOWN = (0.25, 0.5, 1.5)  # of the factor that was found: more points of the curve
_STEPS, _BATCH, _NEUTRAL = 32, 24, 8  # of tuning: Adam's steps, pairs and neutral rows of each
_RATE = 0.01  # Adam's, as a share of the direction's length a step and coordinate


@dataclass(frozen=True)
class LayerTried:
    """What a direction at one layer did, at a factor where the KL is about the target.

    `norm` is the direction's length over that of the stream it is added to.
    """

    layer: int
    norm: float
    factor: float
    mean_kl: float
    p95_kl: float
    effect: float
    per_nat: float  # effect by KL: what layers are chosen by


@dataclass(frozen=True, eq=False)
class Steering:
    """A direction with its layer and its calibrated strength, and how both were found.

    KL is in nats, a neutral prompt's being the mean over the tokens of the base model's own answer; the effect is how
    much the log-probability (mean a token) of what is wished for rises over that of its opposite, in nats.
    """

    name: str
    how: How
    layer: int
    vector: Tensor = field(repr=False)  # (width,), float32 on the CPU: factor 1
    factor: float
    measure: Measure
    target: float
    mean_kl: float
    p95_kl: float
    effect: float
    curve: tuple[Point, ...]  # every trial at this layer, by factor
    layers: tuple[LayerTried, ...]  # empty where the layer was given
    examples: int  # that the direction was found on, of both sides
    held: int  # that the effect was measured on; the same ones where there were too few to split
    neutral: int  # prompts that the KL was measured on

    @property
    def site(self) -> str:
        """Where it is added."""
        return f"layers.{self.layer}.resid"

    @property
    def norm(self) -> float:
        """The length of what is added."""
        return abs(self.factor) * float(self.vector.norm())

    @property
    def reached(self) -> float:
        """The KL that was calibrated."""
        return self.mean_kl if self.measure == "mean" else self.p95_kl

    def adjustment(self, strength: float = 1.0) -> Adjustment:
        """What adds it, at `strength` times the calibrated factor."""
        note = f"{self.how} of {self.examples} examples at layer {self.layer}, factor {self.factor:.3g}: "
        note += f"{self.measure} KL {self.reached:.3g} on {self.neutral} neutral prompts, effect {self.effect:+.2f}."
        op = Steer(site=self.site, vector=self.vector, scale=strength * self.factor)
        return Adjustment(name=f"steer: {self.name}", method="steer", ops=(op,), note=note)

    def as_dict(self) -> dict[str, Any]:
        """All but the vector, as JSON takes it."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("vector", "curve")}
        plain |= {"site": self.site, "norm": self.norm, "reached": self.reached}
        return plain | {"curve": [asdict(p) for p in self.curve], "layers": [asdict(each) for each in self.layers]}

    def picture(self) -> Figure:
        """KL and effect against the factor, and the layers that were tried."""
        from plotly.graph_objects import Bar, Scatter
        from plotly.subplots import make_subplots

        figure: Figure = make_subplots(
            rows=1,
            cols=2 if self.layers else 1,
            specs=[[{"secondary_y": True}, {}] if self.layers else [{"secondary_y": True}]],
            column_widths=[0.62, 0.38] if self.layers else None,
            horizontal_spacing=0.16,
            subplot_titles=[f"layer {self.layer}: what the factor costs and does"]
            + ["effect per nat of KL, by layer"] * bool(self.layers),
        )
        factors = [point.factor for point in self.curve]
        for name, values, dash in (
            ("mean KL", [point.mean_kl for point in self.curve], "solid"),
            ("p95 KL", [point.p95_kl for point in self.curve], "dot"),
        ):
            line = {"color": "#c0392b", "dash": dash}
            figure.add_trace(Scatter(x=factors, y=values, name=name, mode="lines+markers", line=line), row=1, col=1)
        effects = [point.effect for point in self.curve]
        line = {"color": "#2471a3"}
        figure.add_trace(
            Scatter(x=factors, y=effects, name="effect", mode="lines+markers", line=line),
            row=1,
            col=1,
            secondary_y=True,
        )
        figure.add_hline(
            y=self.target,
            line_dash="dash",
            line_color="#888",
            row=1,
            col=1,
            annotation_text=f"target {self.measure} KL",
        )
        figure.add_vline(x=self.factor, line_dash="dash", line_color="#888", row=1, col=1)
        figure.update_xaxes(title_text="factor", row=1, col=1)
        figure.update_yaxes(title_text="KL on neutral prompts (nats)", rangemode="tozero", row=1, col=1)
        right = {"title_text": "effect (nats)", "rangemode": "tozero", "showgrid": False, "tickformat": ".2~f"}
        figure.update_yaxes(**right, tickmode="auto", row=1, col=1, secondary_y=True)
        if self.layers:
            chosen = ["#2471a3" if each.layer == self.layer else "#aab7c4" for each in self.layers]
            figure.add_trace(
                Bar(
                    x=[str(each.layer) for each in self.layers],
                    y=[each.per_nat for each in self.layers],
                    marker_color=chosen,
                    showlegend=False,
                ),
                row=1,
                col=2,
            )
            figure.update_xaxes(title_text="layer", type="category", row=1, col=2)
        figure.update_layout(
            title=f"steer: {self.name}", template="plotly_white", legend={"orientation": "h", "y": -0.2}
        )
        return figure


def steering(
    engine: TransformersEngine,
    sides: Sides,
    neutral: Sequence[ScoreItem],
    *,
    how: How = "mean",
    layer: int | None = None,
    target: float = 0.5,
    measure: Measure = "p95",
    progress: bool = False,
) -> Steering:
    """Find direction, layer and strength, under the engine's present state.

    `neutral` are prompts with the model's own answers, whose KL is to be `target` nats (the mean over prompts, or the
    95th percentile). The layer is the one with the most effect per nat of KL on examples that no direction was found on
    (every third one is held back for this), each layer being tried at about the target. Raises UnknownSite for a layer
    that is not there; InvalidInput for a target not above 0, no neutral prompts, two sides that are the same, or
    examples that do not fit `how`; NoMendFound where the effect is never above 0 or no factor reaches the target.
    """
    if not target > 0:
        raise InvalidInput(f"The target KL cannot be {target}.", hint="Give a number above 0, such as 0.5.")
    if not neutral:
        raise InvalidInput(
            "There are no neutral prompts to calibrate on.", hint="Give the guard a chat probe at least."
        )
    layers = candidates(engine, how) if layer is None else [layer]
    engine.sites.check_layer(layers[-1])
    fitting, held = sides.split()
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task("Reading both sides", total=None)
        vectors = directions(engine, fitting, layers, how)
        effect = Effect(engine, held, layers)
        few = Rows(engine, _spread(neutral, _FEW), layers)
        tried: list[LayerTried] = []
        bar.update(task, description="Trying layers", total=len(layers))
        for each in layers:
            tried.append(_try_layer(few, effect, each, vectors[each], target, measure))
            bar.advance(task)
        best = max(tried, key=lambda found: found.per_nat)
        vector = vectors[best.layer]
        if how == "tuned":
            bar.update(task, description=f"Tuning layer {best.layer}", total=_STEPS, completed=0)
            start = best.factor * vector
            vector = _tuned(engine, fitting, few, best.layer, start, best.mean_kl, lambda: bar.advance(task))
            best = replace(best, factor=1.0)
        bar.update(task, description=f"Calibrating layer {best.layer}", total=None)
        rows = Rows(engine, neutral, [best.layer])
        curve: list[Point] = []

        def trial(factor: float) -> Point:
            added = factor * vector
            mean, p95 = summed_up(rows.kl(best.layer, added))
            curve.append(Point(factor, mean, p95, effect(best.layer, added)))
            return curve[-1]

        found, reached = calibrate(trial, target, measure, first=best.factor, tolerance=_AIM, most=_TRIALS)
        if not reached and abs(found.kl(measure) / target - 1.0) > TOLERANCE:
            raise NoMendFound(
                f"No strength of {sides.name} has a {measure} KL of {target:g}: {found.kl(measure):.3g} is nearest.",
                hint="Choose another target, or another layer.",
            )
        if found.effect <= 0:
            raise NoMendFound(
                f"Steering along {sides.name} does not make it likelier: the effect at layer {best.layer} is "
                f"{found.effect:+.3f} nats at a {measure} KL of {found.kl(measure):.2g}.",
                hint="Give more or clearer examples, another layer, a larger KL, or pairs with --how tuned.",
            )
        for share in _SHOWN:
            trial(share * found.factor)
    return Steering(
        name=sides.name,
        how=how,
        layer=best.layer,
        vector=vector,
        factor=found.factor,
        measure=measure,
        target=target,
        mean_kl=found.mean_kl,
        p95_kl=found.p95_kl,
        effect=found.effect,
        curve=tuple(sorted(curve, key=lambda point: point.factor)),
        layers=tuple(tried) if layer is None else (),
        examples=2 if how == "pair" else len(fitting.toward) + len(fitting.away),
        held=effect.examples,
        neutral=len(neutral),
    )


def candidates(engine: TransformersEngine, how: How = "mean") -> list[int]:
    """The layers that are tried where none is given."""
    depths = _TUNED_DEPTHS if how == "tuned" else _DEPTHS
    first, last = (round(depth * (engine.sites.layers - 1)) for depth in depths)
    count = min(_LAYERS, last - first + 1)
    return sorted({first + round(place * (last - first) / max(count - 1, 1)) for place in range(count)})


def directions(engine: TransformersEngine, sides: Sides, layers: Sequence[int], how: How) -> dict[int, Tensor]:
    """A direction (width,) for each layer's residual stream, all read in one pass.

    `mean`, and the start of `tuned`: the difference of the two sides' means. `pca`: the first principal component of
    the paired differences about zero, as long as their root mean square along it, on the side of their mean. `pair`:
    the first pair's difference. Raises InvalidInput where they are not pairs, or have no answers, and need be, or both
    sides are the same.
    """
    if how in ("pca", "tuned") and not sides.paired:
        raise InvalidInput(f"{how} needs pairs, and {sides.name} is two sets.", hint="Give pairs, or use mean.")
    if how == "tuned" and not sides.answered:
        raise InvalidInput(
            "tuned trains on the answers to prompts, and these examples have none.",
            hint="Give questions with both answers, or use mean.",
        )
    if how == "pair":
        sides = replace(sides, toward=sides.toward[:1], away=sides.away[:1])
    toward, away = (_read(engine, side, layers) for side in (sides.toward, sides.away))  # (layers, n, width)
    found = {}
    for place, layer in enumerate(layers):
        vector = toward[place].mean(0) - away[place].mean(0)
        if how == "pca":
            differences = toward[place] - away[place]  # (n, width)
            _, sizes, rows = torch.linalg.svd(differences, full_matrices=False)
            sign = 1.0 if float(rows[0] @ vector) >= 0 else -1.0
            vector = sign * float(sizes[0]) / len(differences) ** 0.5 * rows[0]
        if not float(vector.norm()) > 0:
            raise InvalidInput(
                f"Both sides of {sides.name} are the same at layer {layer}.", hint="Give two that differ."
            )
        found[layer] = vector
    return found


class Effect:
    """How much likelier than its opposite what is wished for becomes, on some examples.

    Log-probability a token of the answers of one side, less that of the other side's: both given to their own prompts
    where the examples hold answers; else the model's own answers to the one and the other prompts, both given to the
    prompts of the opposite.
    """

    def __init__(self, engine: TransformersEngine, sides: Sides, layers: Sequence[int]) -> None:
        """Run the examples once."""
        toward, away = _spread(sides.toward, _JUDGED), _spread(sides.away, _JUDGED)
        self.examples = len(toward) + len(away)
        if not sides.answered:
            own = [[tuple(a) for a in engine.greedy([e.prompt for e in side], _ANSWER)] for side in (toward, away)]
            prompts = [example.prompt for example in away]
            toward = [Example(prompts[i % len(prompts)], answer) for i, answer in enumerate(own[0])]
            away = [Example(prompt, answer) for prompt, answer in zip(prompts, own[1], strict=True)]
        self._rows = Rows(engine, _items([*toward, *away]), layers)
        self._sides = (slice(0, len(toward)), slice(len(toward), None))
        self._before = self._margin(self._rows.logprobs())

    def __call__(self, layer: int, added: Tensor) -> float:
        """In nats, with `added` (width,) behind a layer, over what it is without."""
        return self._margin(self._rows.logprobs(layer, added)) - self._before

    def _margin(self, logprobs: Tensor) -> float:
        toward, away = self._sides
        return float(logprobs[toward].mean() - logprobs[away].mean())


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """A direction from the judged answer to the wished one, read where they part, that mends the case.

    The factor is doubled until it works, at every other candidate layer (or `settings.layer`), and the layer taken
    whose direction moves what is to be left alone the least. It is added at every token of everything, so the guard
    will mostly refuse it. Raises NoMendFound where no layer's does it; UnknownSite for a layer that is not there.
    """
    layers = candidates(engine)[::2] if settings.layer is None else [settings.layer]
    engine.sites.check_layer(layers[-1])
    chosen = chosen_contexts(case, settings)
    parts = [
        (context, apart)
        for context in case.contexts
        if (apart := parting(case.answer_tokens, context.target)) is not None
    ]
    if not parts:
        raise no_mend("steer", case, ["the judged and the wished answer do not part"])
    sides = [
        tuple(Example((*context.prompt, *answer[:apart]), answer[apart : apart + 1]) for context, answer, apart in side)
        for side in (
            [(context, context.target, apart) for context, apart in parts],
            [(context, case.answer_tokens, apart) for context, apart in parts],
        )
    ]
    vectors = directions(engine, Sides(case.question, sides[0], sides[1], True), layers, "mean")
    alone = _spread([*_targets(case.others), *_targets(case.about)], _FEW)
    rows = Rows(engine, alone, layers) if alone else None
    before = {among: outcome(engine, case, None, among) for among in {chosen, case.contexts}}
    best: tuple[float, Adjustment] | None = None
    tried: list[str] = []
    for layer in layers:
        stream = _length(engine, case, layer)
        share = _FIRST
        while share <= 2.0:
            factor = share * stream / float(vectors[layer].norm())
            op = Steer(site=f"layers.{layer}.resid", vector=vectors[layer], scale=factor)
            note = f"Layer {layer}, {share:.2f} of the stream's length, at every token."
            found = Adjustment(name=named("steer", case), method="steer", ops=(op,), note=note)
            if all(works(case, outcome(engine, case, found, each), before[each]) for each in (chosen, case.contexts)):
                cost = float(rows.kl(layer, factor * vectors[layer]).mean()) if rows else share
                if best is None or cost < best[0]:
                    best = (cost, found)
                break
            share *= 2.0
        else:
            tried.append(f"layer {layer} up to twice the stream's length")
    if best is None:
        raise no_mend("steer", case, tried)
    return best[1]


# ------------------------------------------------------------------------------------------------------ internal


def _try_layer(few: Rows, effect: Effect, layer: int, vector: Tensor, target: float, measure: Measure) -> LayerTried:
    """The layer at about the target KL, on a few neutral prompts."""
    stream = float(torch.cat([each[1:] for each in few.streams[layer]]).float().norm(dim=-1).mean())

    def trial(factor: float) -> Point:
        return Point(factor, *summed_up(few.kl(layer, factor * vector)), effect=0.0)

    norm = float(vector.norm()) / stream
    found, _ = calibrate(trial, target, measure, first=_FIRST / norm, tolerance=_ROUGH, most=_ROUGH_TRIALS)
    moved = effect(layer, found.factor * vector)
    reached = max(found.kl(measure), 1e-6)
    return LayerTried(layer, norm, found.factor, found.mean_kl, found.p95_kl, moved, moved / reached)


def _tuned(
    engine: TransformersEngine,
    sides: Sides,
    neutral: Rows,
    layer: int,
    start: Tensor,
    budget: float,
    advance: Callable[[], None],
) -> Tensor:
    """(width,) a direction trained, from `start`, on the pairs: loss softplus(log p(away) - log p(toward)).

    What goes over `budget` nats of mean KL on the neutral rows is added to the loss. Deterministic.
    """
    pairs = Rows(engine, _items([*sides.toward, *sides.away]), [layer])
    count = len(sides.toward)
    order: list[int] = []
    chance = random.Random(0)
    vector = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([vector], lr=_RATE * float(start.norm()))
    for _ in range(_STEPS):
        if len(order) < min(_BATCH, count):
            order = chance.sample(range(count), count)
        batch, order = order[:_BATCH], order[_BATCH:]
        some = chance.sample(range(len(neutral)), min(_NEUTRAL, len(neutral)))
        with torch.enable_grad():
            said = _logprobs(engine, pairs, [*batch, *(count + i for i in batch)], layer, vector)
            loss = torch.nn.functional.softplus(said[len(batch) :] - said[: len(batch)]).mean()
            after = neutral.run_some(some, layer, vector)
            kl = kl_between(engine, torch.cat([neutral.finals[i] for i in some]), torch.cat(after)).mean()
            loss = loss + torch.relu(kl / budget - 1.0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        advance()
    return vector.detach().float().cpu()


def _logprobs(engine: TransformersEngine, rows: Rows, some: Sequence[int], layer: int, added: Tensor) -> Tensor:
    """(some,) log-probability of what is said in each row, differentiable in `added`."""
    found = []
    for row, final in zip(some, rows.run_some(some, layer, added), strict=True):
        tokens = torch.tensor(rows.items[row].continuation, device=final.device)[:, None]
        found.append(engine.unembed(final).float().log_softmax(-1).gather(1, tokens).sum().cpu())
    return torch.stack(found)


def _read(engine: TransformersEngine, examples: Sequence[Example], layers: Sequence[int]) -> Tensor:
    """(layers, examples, width) what the stream holds over each answer's tokens (mean), else at the prompt's end."""
    found = []
    for start in range(0, len(examples), _READ):
        batch = examples[start : start + _READ]
        rows = Rows(engine, _items(batch), layers)
        for place, example in enumerate(batch):
            first = len(example.prompt) if example.answer else len(example.prompt) - 1
            found.append(torch.stack([rows.streams[layer][place][first:].float().mean(0).cpu() for layer in layers]))
    return torch.stack(found, dim=1)


def _length(engine: TransformersEngine, case: Case, layer: int) -> float:
    """The residual stream's length at the question's last token."""
    site = f"layers.{layer}.resid"
    return float(engine.trace(case.contexts[0].prompt, [site]).values[site][-1].norm())


def _items(examples: Sequence[Example]) -> list[ScoreItem]:
    return [ScoreItem(example.prompt, example.answer) for example in examples]


def _targets(contexts: Sequence[Context]) -> list[ScoreItem]:
    return [ScoreItem(context.prompt, context.target) for context in contexts if context.target]


def _spread(all_of_them: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly spread over all."""
    count = min(most, len(all_of_them))
    return [all_of_them[place * len(all_of_them) // count] for place in range(count)]
