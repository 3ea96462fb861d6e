"""What the neurons did while an answer was produced.

Owns reading activations, and their gradients where asked, at the positions that an answer came from: the prompt's
last token, which predicts the answer's first, and every token of the answer but its last. Knows nothing of rankings
or labels. Nothing here writes: weights, hooks, caches and random state stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liveweight.engines.base import Objective, Version
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, Unsupported

Neuron = tuple[int, int]  # layer, index in the layer


@dataclass(frozen=True, eq=False)
class AnswerReading:
    """One answer, read once. Row p of every tensor is the position that predicted token p of the answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    activations: Tensor  # (layers, P, neurons), float32 on the CPU
    gradients: Tensor | None  # (layers, P, neurons) of the margin, where one was asked for
    logits: Tensor  # (P, vocabulary), float32 on the CPU
    margin: float | None  # nats
    version: Version

    def pushes(self) -> Tensor:
        """Gradient times activation, in nats: (layers, P, neurons). Raises InvalidInput when read without gradients."""
        if self.gradients is None:
            raise InvalidInput("This answer was read without gradients.", hint="Read it with gradients=True.")
        return self.gradients * self.activations


def read_answer(
    engine: TransformersEngine,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    against: Sequence[int] = (),
    gradients: bool = False,
) -> AnswerReading:
    """Read every layer's neurons where the answer came from, under the present weights.

    `prompt`, `answer` and `against` are token ids. One forward pass and, with `gradients`, one backward pass of the
    margin: the answer's logit over that of `against` at the token where the two part, or, without `against`, each of
    the answer's tokens over its runner-up, summed. Raises InvalidInput for an empty prompt or answer, or where answer
    and `against` do not part, and Unsupported where neurons are spread over experts.
    """
    require_dense(engine)
    if not prompt or not answer:
        raise InvalidInput(
            f"There is no {'answer' if prompt else 'prompt'} to read.", hint="Give at least one token of each."
        )
    layers = range(engine.sites.layers)
    sites = [f"layers.{layer}.mlp.neurons" for layer in layers]
    objective = Objective(tuple(answer), tuple(against)) if gradients else None
    tokens = list(prompt) if gradients else [*prompt, *answer]  # with an objective the engine appends the answer
    # Held throughout, so that the logits are those of the weights that were traced.
    with engine.gate.step():
        trace = engine.trace(tokens, [*sites, "final.resid"], objective, prompt=len(prompt))
        rows = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
        final = trace.values["final.resid"][rows]
        head = engine.sites.weight("lm_head.weight").parameter
        with torch.no_grad():
            logits = engine.unembed(final.to(head.device, head.dtype)).float().cpu()
    return AnswerReading(
        prompt=tuple(prompt),
        answer=tuple(answer),
        activations=torch.stack([trace.values[site][rows] for site in sites]),
        gradients=torch.stack([trace.gradients[site][rows] for site in sites]) if gradients else None,
        logits=logits,
        margin=trace.objective,
        version=trace.version,
    )


def require_dense(engine: TransformersEngine) -> None:
    """Raises Unsupported for a model with experts: a token then runs through a few of them only."""
    if engine.sites.experts:
        raise Unsupported(
            f"The neurons of this {engine.sites.architecture} model are spread over {engine.sites.experts} experts a "
            "layer, and tracing reads dense layers only.",
            hint="Trace layers.*.resid and layers.*.mlp.router, or use a model without experts.",
        )
