"""Batches that are run once and then, from any layer on, again and again.

Owns the batch that methods and the guard spend their time in:

    each row's prefix, padded on the left | each row's suffix, padded on the right

or, packed, the suffixes one after another in a single row, with a mask that tells them apart and nothing padded. The
prefixes are run once, shared tokens once for all rows where there is a tree, and kept as keys and values. The suffix is
what a change is tried on: its input to any recorded layer is kept, so that a trial runs only the layers from the
changed one up. Blocks are called with the very arguments that the model itself called them with, so this works for
every architecture. Reads the model; what a trial changes is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from liveweight.engines.prefix_tree import Branches, FixedCache, KeysAndValues, PrefixTree
from liveweight.errors import Unsupported
from liveweight.sites import ModelSites


def keys_and_values(cache: DynamicCache) -> KeysAndValues:
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
    ids: Tensor  # (B, T) the suffixes, padded on the right; (1, sum of T) where they are packed
    final: Tensor  # (B, T, width) as the unembedding reads it, under the weights of the recording
    inputs: dict[int, Tensor]  # layer -> (B, T, width), what the block was given
    neurons: dict[int, Tensor]  # layer -> (B, T, neurons)
    mlp_inputs: dict[int, Tensor] = field(default_factory=dict)  # layer -> (B, T, width), what the MLP read
    packed: list[int] | None = None  # where each suffix begins in the one row
    around: Callable[[], AbstractContextManager[None]] = nullcontext  # what hooks have to know while it is run again
    _calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False, default_factory=list)

    @property
    def tokens(self) -> int:
        """How many positions a replay computes, padding included."""
        return self.ids.numel()

    def lengths(self) -> list[int]:
        """Each suffix's own number of tokens."""
        return [len(row) - start for row, start in zip(self.rows, self.starts, strict=True)]

    def at(self, row: int, position: int) -> tuple[int, int]:
        """Where a row's absolute position, in its suffix, lies in what is computed."""
        behind = position - self.starts[row]
        return (row, behind) if self.packed is None else (0, self.packed[row] + behind)

    def run(self, layer: int, hidden: Tensor | None = None) -> Tensor:
        """The blocks from `layer` up and the final norm: (B, T, width). Weights and hooks of now are what counts."""
        hidden = self.inputs[layer] if hidden is None else hidden
        with self.around():
            for index in range(layer, len(self.sites.blocks)):
                args, kwargs = self._calls[index]
                output = self.sites.blocks[index](hidden, *args, **kwargs)
                hidden = output[0] if isinstance(output, tuple) else output
            final: Tensor = self.sites.final_norm(hidden)
        return final


def unembed(model: PreTrainedModel, sites: ModelSites, final: Tensor) -> Tensor:
    """Logits (…, vocabulary) of what leaves the final norm, softcapped where the model does that."""
    logits: Tensor = sites.lm_head(final)
    return _scaled(model, logits)


def unembed_by(model: PreTrainedModel, final: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """As `unembed`, by another table (vocabulary, width)."""
    return _scaled(model, torch.nn.functional.linear(final, table, bias))


def unembed_tokens(model: PreTrainedModel, sites: ModelSites, final: Tensor, tokens: Tensor) -> Tensor:
    """Logits (N, k) of some tokens (N, k) behind `final` (N, width)."""
    logits = torch.einsum("nd,nkd->nk", final, sites.weight("lm_head.weight").parameter.detach()[tokens])
    if sites.has_weight("lm_head.bias"):
        logits = logits + sites.weight("lm_head.bias").parameter.detach()[tokens]
    return _scaled(model, logits)


def _scaled(model: PreTrainedModel, logits: Tensor) -> Tensor:
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
    final: bool = True,
    tree: PrefixTree | None = None,
    pad: int = 0,
    packed: bool = False,
) -> Replay:
    """Run a batch once and keep what a replay needs; what stands before the suffixes comes from `tree`, if given.

    `rows` are whole token sequences, `starts` where each one's suffix begins; the inputs of the blocks in
    `layers`, the neurons of the layers in `neurons` and what the MLPs in `mlp_inputs` read are kept. Where `final` is
    not asked for, the blocks behind all of these only hand on what they get, and `final` means nothing. `packed` asks
    for the suffixes in one row, as far as there is a `tree`.
    """
    sequences = [list(row) for row in rows]
    device = next(model.parameters()).device
    count = len(sequences)
    suffixes = [row[start:] for row, start in zip(sequences, starts, strict=True)]
    lengths = [len(suffix) for suffix in suffixes]
    offsets: list[int] | None = None
    if packed and tree is not None:
        paths = tree.extend([row[:start] for row, start in zip(sequences, starts, strict=True)])
        past, real = tree.past_once(paths, lengths)
        offsets = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        ids = torch.tensor([list(chain.from_iterable(suffixes))], device=device)
        places = [range(start, len(row)) for row, start in zip(sequences, starts, strict=True)]
        positions = torch.tensor([list(chain.from_iterable(places))], device=device)
    else:
        past, seen = _past(model, sequences, starts, tree, pad)
        longest = max(lengths)
        real = torch.cat((torch.tensor(seen, device=device), torch.ones(count, longest, device=device).long()), dim=1)
        ids = torch.tensor([suffix + [pad] * (longest - len(suffix)) for suffix in suffixes], device=device)
        # Behind a row's end nothing is read, and its positions may be more than the model has.
        counted = torch.tensor(starts)[:, None] + torch.arange(longest)
        positions = counted.clamp(max=torch.tensor([[len(row) - 1] for row in sequences])).to(device)
    replay = Replay(model, sites, sequences, list(starts), ids, torch.empty(0), {}, {}, packed=offsets)

    def before(index: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            replay._calls.append((args[1:], rest))
            if index in layers:
                replay.inputs[index] = hidden

        return keep

    hooks = [
        # Before an active steering of the block's input, which acts again when the block is called again.
        block.register_forward_pre_hook(before(index), with_kwargs=True, prepend=True)
        for index, block in enumerate(sites.blocks)
    ]
    for layer in neurons:
        point = sites.activation(f"layers.{layer}.mlp.neurons")
        hooks.append(point.on(lambda value, layer=layer: replay.neurons.__setitem__(layer, value)))  # type: ignore[misc]
    for layer in mlp_inputs:
        reader = sites.weight(sites.mlp_part(layer, "up")).module
        hooks.append(
            reader.register_forward_pre_hook(lambda _, args, layer=layer: replay.mlp_inputs.__setitem__(layer, args[0]))
        )
    deepest = len(sites.blocks) if final else max((*layers, *neurons, *mlp_inputs), default=0) + 1
    with ExitStack() as undo:
        for hook in hooks:
            undo.callback(hook.remove)
        for block in sites.blocks[deepest:]:
            undo.callback(_hand_on(block))
        cache = FixedCache(model, past)
        output = model.base_model(
            input_ids=ids,
            past_key_values=cache,
            attention_mask=real,
            position_ids=positions,
        )
    replay.final = output.last_hidden_state
    cache.forget_below(min(layers, default=len(sites.blocks)))
    return replay


def _hand_on(block: nn.Module) -> Callable[[], None]:
    """Let a block hand on what it gets, where its arguments are wanted and not its work; returns what ends that."""
    block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return lambda: delattr(block, "forward")


def _past(
    model: PreTrainedModel, rows: list[list[int]], starts: Sequence[int], tree: PrefixTree | None, pad: int
) -> tuple[KeysAndValues, list[list[int]]]:
    """Keys and values before each suffix, and which of them count, (rows, length)."""
    if tree is not None and any(starts):
        return tree.past(tree.extend([row[:start] for row, start in zip(rows, starts, strict=True)]))
    # Each row for itself: what hooks do depends on the row that a position is in.
    device, cache = next(model.parameters()).device, full_cache()
    prompts = [row[:start] for row, start in zip(rows, starts, strict=True)]
    widest = max(1, *map(len, prompts))  # where nothing stands before, one place that does not count
    seen = [[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    real = torch.tensor(seen, device=device)
    ids = torch.tensor([[pad] * (widest - len(prompt)) + prompt for prompt in prompts], device=device)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    model.base_model(input_ids=ids, past_key_values=cache, attention_mask=real, position_ids=positions)
    return keys_and_values(cache), seen


def packed_paths(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Where each row's tokens lie in the one sequence that `run_whole` makes of rows."""
    branches = Branches(model)
    return [branches.add(row) for row in rows]


def packed_prompts(paths: Sequence[Sequence[int]], prompts: Sequence[int]) -> Tensor:
    """(1, N) for each token of that one sequence, the length of its row's prompt; the longest, where rows share it."""
    found = torch.zeros(1, 1 + max(node for path in paths for node in path), dtype=torch.int64)
    for path, length in zip(paths, prompts, strict=True):
        found[0, path] = found[0, path].clamp(min=length)
    return found


def run_whole(
    model: PreTrainedModel,
    sites: ModelSites,
    rows: Sequence[Sequence[int]],
    *,
    layer: int = 0,
    inputs: Sequence[Tensor] | None = None,
    until: int | None = None,
    keep: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run whole sequences as one packed tree: all blocks, or, with `inputs`, only those from `layer` up.

    `inputs` are what the block `layer` was given for each row, (T, width), as an earlier call with `keep=layer`
    returned them. Returns, a row, what leaves the final norm and the input to the block `keep`, (T, width); with
    `inputs` and `until`, the input to that block instead of what leaves the final norm.
    """
    branches = Branches(model)
    paths = [branches.add(row) for row in rows]
    device = next(model.parameters()).device
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    given: list[Tensor] = []

    def before(index: int) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))
            if index == keep:
                given.append((args[0] if args else kwargs["hidden_states"])[0])

        return look

    with ExitStack() as undo:
        for index, block in enumerate(sites.blocks):
            undo.callback(block.register_forward_pre_hook(before(index), with_kwargs=True, prepend=True).remove)
            if inputs is not None:
                undo.callback(_hand_on(block))
        output = model.base_model(
            input_ids=torch.tensor([branches.tokens], device=device),
            attention_mask=branches.mask(0, len(branches), ()),
            position_ids=torch.tensor([branches.depths], device=device),
            use_cache=False,
        )
    final = output.last_hidden_state[0]
    if inputs is not None:
        hidden = inputs[0].new_zeros(1, len(branches), inputs[0].shape[1])
        for row, path in zip(inputs, paths, strict=True):
            hidden[0, path] = row  # where rows share a token, they were given the same there
        hidden = hidden.to(device)
        for index in range(layer, len(sites.blocks) if until is None else until):
            args, kwargs = calls[index]
            result = sites.blocks[index](hidden, *args, **kwargs)
            hidden = result[0] if isinstance(result, tuple) else result
        final = (sites.final_norm(hidden) if until is None else hidden)[0]
    return [final[path] for path in paths], [given[0][path] for path in paths] if given else []
