"""The parts of a model that an answer can be put down to, and one reading of them all.

Owns the kinds of parts (neurons, MLP outputs, attention heads, positions of the residual stream), where each is read
in every architecture, the margin that a part pushes, and a forward pass that keeps them, with the graph for gradients
where asked. Knows nothing of any measure. Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.sites import ActivationPoint, ModelSites

PartKind = Literal["neurons", "mlp", "heads", "resid"]
KINDS: tuple[PartKind, ...] = get_args(PartKind)


@dataclass(frozen=True)
class Margin:
    """What is attributed: at each of `rows`, counted from the prompt's first token, a token's logit over a rival's.

    Fixed once, so that every run of whatever was changed is measured by the same tokens.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    rivals: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many tokens of prompt and answer have to be run."""
        return max(self.rows) + 1

    def behind(self, start: int) -> Margin:
        """The rows from `start` on, counted from there; the others are not moved by anything at or behind it."""
        there = [each for each in zip(self.rows, self.tokens, self.rivals, strict=True) if each[0] >= start]
        return Margin(
            tuple(row - start for row, _, _ in there),
            tuple(token for _, token, _ in there),
            tuple(rival for _, _, rival in there),
        )

    def of(self, engine: TransformersEngine, final: Tensor, *, straight: bool = False) -> Tensor:
        """Nats (B,) of what leaves the final norm, (B, length, width). Differentiable in it.

        `straight` takes a capped logit's gradient as the uncapped logit times its ratio to it, held constant.
        """
        device = final.device
        pairs = torch.tensor([self.tokens, self.rivals], device=device).T  # (rows, 2)
        batch, rows = len(final), len(self.rows)
        at = final[:, list(self.rows)].reshape(batch * rows, -1)
        tokens = pairs.repeat(batch, 1)
        logits = engine.unembed_tokens(at, tokens).float()
        if straight:
            weight = engine.sites.weight("lm_head.weight").parameter.detach()[tokens]  # (B · rows, 2, width)
            plain = torch.einsum("nd,nkd->nk", at, weight).float()
            logits = in_value(logits, plain * ratio(logits, plain))
        return (logits[:, 0] - logits[:, 1]).view(batch, rows).sum(1)


def margin_of(
    engine: TransformersEngine, prompt: Sequence[int], answer: Sequence[int], against: Sequence[int] = ()
) -> Margin:
    """The margin of an answer over another at the token where they part, else of each token over its runner-up.

    All are token ids; the runner-ups are those of the present weights. Raises InvalidInput for an empty prompt or
    answer, or where the two do not part.
    """
    if not prompt or not answer:
        raise InvalidInput(
            f"There is no {'answer' if prompt else 'prompt'} to read.", hint="Give at least one token of each."
        )
    first = len(prompt) - 1
    if against:
        apart = next((i for i, (a, b) in enumerate(zip(answer, against, strict=False)) if a != b), None)
        if apart is None:
            raise InvalidInput(
                "The two answers begin alike, so there is no margin between them.", hint="Give two different answers."
            )
        return Margin((first + apart,), (answer[apart],), (against[apart],))
    rows = tuple(range(first, first + len(answer)))
    found = read(engine, [*prompt, *answer[:-1]], [], prompt=len(prompt))
    with torch.no_grad():
        final = found.final[0, list(rows)]
        rivals = engine.rivals(final, torch.tensor(answer, device=final.device), 1)[:, 0].tolist()
    return Margin(rows, tuple(answer), tuple(rivals))


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class PartReading:
    """One forward pass. With a graph, every tensor can be differentiated by the ones that came before it."""

    values: Mapping[str, Tensor]  # point -> (1, T, size)
    final: Tensor  # (1, T, width), what leaves the final norm


def points_of(sites: ModelSites, kind: PartKind) -> list[ActivationPoint]:
    """Where the parts of a kind are, a layer. An MLP's output is what it adds to the stream, behind any norm."""
    match kind:
        case "neurons":
            return [sites.activation(f"layers.{layer}.mlp.neurons") for layer in range(sites.layers)]
        case "heads":
            return [sites.activation(f"layers.{layer}.attn.heads") for layer in range(sites.layers)]
        case "resid":
            return [sites.activation(f"layers.{layer}.resid") for layer in range(sites.layers)]
        case "mlp":
            return writes_of(sites, "mlp")


def writes_of(sites: ModelSites, part: Literal["attn", "mlp"]) -> list[ActivationPoint]:
    """What the attention, or the MLP, of each layer adds to the stream."""
    return [point for point in sites.stream_writes() if point.site.endswith(f".{part}.write")]


def count_of(sites: ModelSites, kind: PartKind, layer: int = 0) -> int:
    """How many parts of a kind a layer has at each position."""
    return {"neurons": sites.neurons_of(layer), "heads": sites.heads}.get(kind, 1)


def read(
    engine: TransformersEngine,
    tokens: Sequence[int],
    points: Sequence[ActivationPoint],
    *,
    prompt: int,
    gradients: bool = False,
    rules: AbstractContextManager[Any] | None = None,
) -> PartReading:
    """Run `tokens` once under the present state and keep what is at `points`.

    `prompt` says how many of the tokens are the prompt, for steering that tells it from the answer. With `gradients`
    the graph is kept, from the embeddings on. `rules` are entered before anything is read, so that what is read is
    what they leave. Hooks, weights and random state are as before afterwards.
    """
    kept: dict[str, Tensor] = {}

    def keep(site: str, value: Tensor) -> Tensor | None:
        if not gradients:
            kept[site] = value
            return None
        kept[site] = value if value.requires_grad else value.detach().requires_grad_()
        return kept[site]

    until, graph = engine.activations.prompt(prompt), torch.set_grad_enabled(gradients)
    with engine.gate.step(), until, graph, rules or nullcontext(), ExitStack() as hooks:
        for point in (engine.sites.activation("embed"), *points):
            hooks.callback(point.on(lambda value, site=point.site: keep(site, value)).remove)  # type: ignore[misc]
        ids = torch.tensor([list(tokens)], device=engine.model.device)
        final = engine.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return PartReading(kept, final)


def split(values: Tensor, kind: PartKind, sites: ModelSites) -> Tensor:
    """What stands at a point, (1, T, size), as its parts: (T, parts, size of each)."""
    parts = sites.heads if kind == "heads" else values.shape[-1] if kind == "neurons" else 1
    return values[0].reshape(values.shape[1], parts, -1)


# ------------------------------------------------------------------------------------------------------- surrogates


def in_value(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` to the bit, with the gradient of `surrogate`."""
    surrogate = surrogate.to(value.dtype)
    return value.detach() + (surrogate - surrogate.detach())


def ratio(out: Tensor, given: Tensor) -> Tensor:
    """Out / given, held constant; 0 where nothing was given, which has no relevance to hand on."""
    with torch.no_grad():
        return torch.where(given == 0, 0.0, out / torch.where(given == 0, 1.0, given))
