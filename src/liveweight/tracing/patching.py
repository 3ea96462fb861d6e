"""True activation patching: put another value in, run on, and see what the margin loses.

Owns running a prompt once, and then, for any number of parts, the layers from each part's own up with that part
replaced. Rows that enter at different layers go on together: a batch grows as it climbs. What stands before a part's
position does not change, and is run once and kept as keys and values. Knows nothing of which parts are worth trying.
Source: Vig et al. 2020 and Meng et al. 2022 (causal mediation analysis, activation patching).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liveweight.engines.prefix_tree import FixedCache
from liveweight.engines.replay import full_cache, keys_and_values
from liveweight.engines.transformers import TransformersEngine
from liveweight.sites import ActivationPoint
from liveweight.tracing.parts import Margin, PartKind, points_of

Progress = Callable[[int, int], None]  # done, of how many
_TOKENS = 4096  # positions of one batch


class Part(NamedTuple):
    """One part: a layer's neuron or head at a position; 0 where a layer has one part there."""

    layer: int
    position: int
    number: int


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A run of the tokens from `start` on, and what each block was called with."""

    start: int
    inputs: list[Tensor]  # a layer, (1, T, width)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


def lost_by_patching(
    engine: TransformersEngine,
    tokens: Sequence[int],
    margin: Margin,
    kind: PartKind,
    parts: Sequence[Part],
    replacement: Sequence[Tensor],
    *,
    prompt: int,
    progress: Progress | None = None,
) -> Tensor:
    """What the margin loses, in nats, when each part alone takes the value that it has in `replacement`: (parts,).

    `replacement` is, a layer, (T, size), T being all tokens. Runs under the present state, which no change moves
    meanwhile.
    """
    found = torch.zeros(len(parts))
    points = points_of(engine.sites, kind)
    at: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        at.setdefault(part.position, []).append(number)
    done = 0
    with engine.gate.step(), engine.activations.prompt(prompt), torch.no_grad():
        for position, numbers in at.items():
            numbers.sort(key=lambda number: parts[number].layer)
            recorded = _record(engine, tokens, position)
            clean = float(_climb(engine, recorded, margin, kind, points, [], replacement)[0])
            rows = max(_TOKENS // (len(tokens) - position), 1)
            for begun in range(0, len(numbers), rows):
                chosen = numbers[begun : begun + rows]
                patched = _climb(engine, recorded, margin, kind, points, [parts[each] for each in chosen], replacement)
                found[chosen] = clean - patched.float().cpu()
                done += len(chosen)
                if progress is not None:
                    progress(done, len(parts))
    return found


def _record(engine: TransformersEngine, tokens: Sequence[int], start: int) -> _Recorded:
    device, model = engine.model.device, engine.model.base_model
    past: dict[str, Any] = {"use_cache": False}
    if start:
        cache = full_cache()
        model(input_ids=torch.tensor([list(tokens[:start])], device=device), past_key_values=cache)
        past = {"past_key_values": FixedCache(engine.model, keys_and_values(cache))}
    recorded = _Recorded(start, [], [])

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded.inputs.append(args[0] if args else kwargs["hidden_states"])
        recorded.calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    with ExitStack() as hooks:
        for block in engine.sites.blocks:
            # Before an active steering of the block's input, which acts again when the block is called again.
            hooks.callback(block.register_forward_pre_hook(keep, with_kwargs=True, prepend=True).remove)
        model(
            input_ids=torch.tensor([list(tokens[start:])], device=device),
            position_ids=torch.arange(start, len(tokens), device=device)[None],
            attention_mask=torch.ones(1, len(tokens), dtype=torch.int64, device=device),
            **past,
        )
    return recorded


def _climb(
    engine: TransformersEngine,
    recorded: _Recorded,
    margin: Margin,
    kind: PartKind,
    points: Sequence[ActivationPoint],
    parts: Sequence[Part],
    replacement: Sequence[Tensor],
) -> Tensor:
    """The margin from `recorded.start` on with each part replaced, (parts,); without parts as it was, (1,).

    Parts come sorted by layer.
    """
    lowest = parts[0].layer if parts else engine.sites.layers - 1
    hidden = recorded.inputs[lowest][: 0 if parts else 1]
    for layer in range(lowest, engine.sites.layers):
        entering = [part for part in parts if part.layer == layer]
        before = len(hidden)
        if entering:
            hidden = torch.cat((hidden, recorded.inputs[layer].expand(len(entering), -1, -1)))
        args, kwargs = recorded.calls[layer]
        with ExitStack() as hooks:
            if entering:
                put = _putting(engine, kind, entering, before, recorded.start, replacement[layer])
                hooks.callback(points[layer].on(put).remove)
            output = engine.sites.blocks[layer](hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
    final = engine.sites.final_norm(hidden)
    return margin.behind(recorded.start).of(engine, final)


def _putting(
    engine: TransformersEngine, kind: PartKind, parts: Sequence[Part], before: int, start: int, replacement: Tensor
) -> Callable[[Tensor], Tensor]:
    """Put the parts of one layer, one a row, into rows `before` and on of what stands at its point."""
    size = replacement.shape[-1]
    each = {"neurons": 1, "heads": engine.sites.head_dim}.get(kind, size)
    columns = torch.tensor([part.number * each for part in parts])[:, None] + torch.arange(each)  # (parts, each)
    positions = torch.tensor([part.position for part in parts])[:, None]
    rows = torch.arange(before, before + len(parts))[:, None]
    wished = replacement[positions.to(replacement.device), columns.to(replacement.device)]

    def put(values: Tensor) -> Tensor:
        changed = values.clone()
        at = tuple(index.to(values.device) for index in (rows, positions - start, columns))
        changed[at] = wished.to(values.device, values.dtype)
        return changed

    return put
