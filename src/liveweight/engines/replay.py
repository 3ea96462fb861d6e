"""Batches that are run once and then, from any layer on, again and again.

Owns the three-part batch that methods and the guard spend their time in:

    shared prefix (one row) | each row's own middle, padded on the left | each row's suffix, padded on the right

Prefix and middle are run once and kept as keys and values. The suffix is what a change is tried on: its input to any
recorded layer is kept, so that a trial runs only the layers from the changed one up. Blocks are called with the very
arguments that the model itself called them with, so this works for every architecture. Reads the model; what a trial
changes is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from liveweight.errors import Unsupported
from liveweight.sites import ModelSites


class FixedCache(DynamicCache):
    """Keys and values that are read and never added to: the same past for every replay."""

    def __init__(self, model: PreTrainedModel, filled: DynamicCache, rows: int) -> None:
        """Take over what `filled` holds, spread over `rows` rows."""
        super().__init__(config=model.config)
        self._past = [
            (keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in keys_and_values(filled)
        ]
        self._length = self._past[0][0].shape[-2]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The past with the new keys and values behind it, (rows, heads, past + new, size); nothing is kept."""
        keys, values = self._past[layer_idx]
        return torch.cat((keys, key_states), dim=-2), torch.cat((values, value_states), dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The past's length."""
        return self._length

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """How long the keys are, and where they begin."""
        new = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self._length + new, 0


def keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """What a cache holds, a layer: keys and values, (rows, kv_heads, length, head_dim). Raises Unsupported."""
    found = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
            raise Unsupported(
                "This model keeps something else than keys and values between tokens.",
                hint="Only models with attention in every layer can be run from a layer on.",
            )
        found.append((keys, values))
    return found


def full_cache() -> DynamicCache:
    """An empty cache that keeps everything, sliding windows too: masks say what is seen, not the cache."""
    return DynamicCache()


@dataclass
class Replay:
    """A recorded batch. `starts` are the absolute positions of the suffixes' first tokens."""

    model: PreTrainedModel
    sites: ModelSites
    rows: list[list[int]]
    starts: list[int]
    ids: Tensor  # (B, T) the suffixes, padded on the right
    final: Tensor  # (B, T, width) as the unembedding reads it, under the weights of the recording
    inputs: dict[int, Tensor]  # layer -> (B, T, width), what the block was given
    neurons: dict[int, Tensor]  # layer -> (B, T, neurons)
    mlp_inputs: dict[int, Tensor] = field(default_factory=dict)  # layer -> (B, T, width), what the MLP read
    _calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False, default_factory=list)

    @property
    def tokens(self) -> int:
        """How many positions a replay computes, padding included."""
        return self.ids.numel()

    def lengths(self) -> list[int]:
        """Each suffix's own number of tokens."""
        return [len(row) - start for row, start in zip(self.rows, self.starts, strict=True)]

    def column(self, row: int, position: int) -> int:
        """Where a row's absolute position lies in the suffix."""
        return position - self.starts[row]

    def run(self, layer: int, hidden: Tensor | None = None) -> Tensor:
        """The blocks from `layer` up and the final norm: (B, T, width). Weights and hooks of now are what counts."""
        hidden = self.inputs[layer] if hidden is None else hidden
        for index in range(layer, len(self.sites.blocks)):
            args, kwargs = self._calls[index]
            output = self.sites.blocks[index](hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        final: Tensor = self.sites.final_norm(hidden)
        return final


def unembed(model: PreTrainedModel, sites: ModelSites, final: Tensor) -> Tensor:
    """Logits (…, vocabulary) of what leaves the final norm, softcapped where the model does that."""
    logits: Tensor = sites.lm_head(final)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    scale = getattr(model.config, "logit_scale", None)
    return logits * scale if scale else logits


def record(
    model: PreTrainedModel,
    sites: ModelSites,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    layers: Sequence[int] = (),
    neurons: Sequence[int] = (),
    mlp_inputs: Sequence[int] = (),
    pad: int = 0,
) -> Replay:
    """Run a batch once and keep what a replay needs.

    `rows` are whole token sequences, `starts` where each one's suffix begins (at least 1); the inputs of the blocks in
    `layers`, the neurons of the layers in `neurons` and what the MLPs in `mlp_inputs` read are kept.
    """
    sequences = [list(row) for row in rows]
    device = next(model.parameters()).device
    count = len(sequences)
    shared = 0
    while shared < min(starts) - 1 and len({row[shared] for row in sequences}) == 1:
        shared += 1
    cache = full_cache()
    if shared:
        model.base_model(input_ids=torch.tensor([sequences[0][:shared]], device=device), past_key_values=cache)
        cache.batch_repeat_interleave(count)
    middles = [row[shared:start] for row, start in zip(sequences, starts, strict=True)]
    widest = max(map(len, middles))
    seen = torch.tensor([[1] * shared + [0] * (widest - len(m)) + [1] * len(m) for m in middles], device=device)
    middle_ids = torch.tensor([[pad] * (widest - len(m)) + m for m in middles], device=device)
    positions = (seen.cumsum(1) - 1)[:, shared:].clamp(min=0)
    model.base_model(input_ids=middle_ids, past_key_values=cache, attention_mask=seen, position_ids=positions)

    suffixes = [row[start:] for row, start in zip(sequences, starts, strict=True)]
    longest = max(map(len, suffixes))
    ids = torch.tensor([suffix + [pad] * (longest - len(suffix)) for suffix in suffixes], device=device)
    seen = torch.cat((seen, seen.new_ones(count, longest)), dim=1)
    positions = torch.stack([torch.arange(start, start + longest, device=device) for start in starts])
    replay = Replay(model, sites, sequences, list(starts), ids, torch.empty(0), {}, {})

    def before(index: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            replay._calls.append((args[1:], rest))
            if index in layers:
                replay.inputs[index] = hidden

        return keep

    hooks = [
        block.register_forward_pre_hook(before(index), with_kwargs=True) for index, block in enumerate(sites.blocks)
    ]
    for layer in neurons:
        point = sites.activation(f"layers.{layer}.mlp.neurons")
        hooks.append(point.on(lambda value, layer=layer: replay.neurons.__setitem__(layer, value)))  # type: ignore[misc]
    for layer in mlp_inputs:
        reader = sites.weight(sites.mlp_part(layer, "up")).module
        hooks.append(
            reader.register_forward_pre_hook(lambda _, args, layer=layer: replay.mlp_inputs.__setitem__(layer, args[0]))
        )
    try:
        output = model.base_model(
            input_ids=ids,
            past_key_values=FixedCache(model, cache, count),
            attention_mask=seen,
            position_ids=positions,
        )
    finally:
        for hook in hooks:
            hook.remove()
    replay.final = output.last_hidden_state
    return replay


def run_whole(
    model: PreTrainedModel,
    sites: ModelSites,
    rows: Sequence[Sequence[int]],
    *,
    layer: int = 0,
    inputs: Sequence[Tensor] | None = None,
    keep: int | None = None,
    pad: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Run whole sequences, padded on the right: all blocks, or, with `inputs`, only those from `layer` up.

    `inputs` are what the block `layer` was given for each row, (T, width), as an earlier call with `keep=layer`
    returned them. Returns what leaves the final norm, (B, T, width), and each row's input to the block `keep`.
    """
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)
    kept: list[Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(index: int) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))
            if index == keep:
                kept.extend(hidden[row, : len(tokens)].clone() for row, tokens in enumerate(rows))

        return look

    with ExitStack() as undo:
        for index, block in enumerate(sites.blocks):
            undo.callback(block.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            if inputs is not None:
                # The blocks' arguments are wanted here, not their work: each hands on what it got.
                block.forward = lambda hidden_states, *args, **kwargs: hidden_states
                undo.callback(delattr, block, "forward")
        output = model.base_model(input_ids=ids, use_cache=False)
    if inputs is None:
        return output.last_hidden_state, kept
    hidden = torch.stack([torch.cat((row, row.new_zeros(longest - len(row), row.shape[1]))) for row in inputs])
    hidden = hidden.to(device)
    for index in range(layer, len(sites.blocks)):
        args, kwargs = calls[index]
        result = sites.blocks[index](hidden, *args, **kwargs)
        hidden = result[0] if isinstance(result, tuple) else result
    return sites.final_norm(hidden), kept
