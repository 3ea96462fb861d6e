"""Token sequences that share their beginnings, each shared token run once.

What a search asks of a model is full of repetitions: the same system prompt before every question, one question before
twelve answers, one opening before many endings. All of it stands in one tree of tokens. What is new in it is run as one
packed sequence in which each token sees itself and the tokens before it on its own branch, so that nothing is padded
and nothing is computed twice (the idea of a radix cache: Zheng et al., "SGLang", 2024; of tree attention: Miao et al.,
"SpecInfer", 2024).

Owns the tree, its keys and values and what left the final norm. A tree belongs to the weights that it was run under,
and to a model without active hooks: its owner drops it when either changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from liveweight.sites import ModelSites

KeysAndValues = list[tuple[Tensor, Tensor]]  # a layer: (rows, kv_heads, length, head_dim) each
_AT_ONCE = 384  # new tokens of one pass: products are at their best, and the mask stays small
_ROOT = -1


class FixedCache(DynamicCache):
    """Keys and values that are read and never added to; what a pass computes is left in `new`."""

    def __init__(self, model: PreTrainedModel, past: KeysAndValues) -> None:
        """Take a past of one length for all rows; of one row only, it is every row's."""
        super().__init__(config=model.config)
        self._past = past
        self._length = past[0][0].shape[-2]
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def forget_below(self, layer: int) -> None:
        """Free what the layers below `layer` see: they will not be run again."""
        nothing = self._past[0][0][..., :0, :]
        self._past = [(nothing, nothing)] * layer + self._past[layer:]
        self.new = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The past with the new keys and values behind it, (rows, heads, past + new, size)."""
        self.new[layer_idx] = (key_states, value_states)
        keys, values = self._past[layer_idx]
        if not keys.shape[-2]:
            return key_states, value_states
        if len(keys) == 1:
            keys, values = (each.expand(len(key_states), -1, -1, -1) for each in (keys, values))
        return torch.cat((keys, key_states), dim=-2), torch.cat((values, value_states), dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The past's length."""
        return self._length

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """How long the keys are, and where they begin."""
        new = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self._length + new, 0


class Branches:
    """A growing tree of tokens, and what each of them sees. Nodes are numbered as they come, parents first."""

    def __init__(self, model: PreTrainedModel) -> None:
        """An empty tree, for the attention of one model."""
        self._config = model.config
        self._like = next(model.parameters()).detach()
        self._children: dict[tuple[int, int], int] = {}
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []

    def __len__(self) -> int:
        """How many tokens it holds."""
        return len(self.tokens)

    def add(self, row: Sequence[int]) -> list[int]:
        """A row's nodes, a token."""
        node = _ROOT
        path: list[int] = []
        for token in map(int, row):
            found = self._children.get((node, token))
            if found is None:
                found = self._children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(len(path))
            node = found
            path.append(node)
        return path

    def before(self, first: int, last: int) -> list[int]:
        """The nodes before `first` that the nodes from `first` to before `last` see."""
        above = {node for node in self.parents[first:last] if _ROOT < node < first}
        return sorted({node for each in above for node in self._line(each)})

    def mask(self, first: int, last: int, before: Sequence[int]) -> Any:
        """What is added to the attention scores of the nodes from `first` to before `last`, (1, 1, new, before + new).

        By kind of layer, where they differ in how far they see.
        """
        column = {node: place for place, node in enumerate(before)}
        sees = torch.zeros(last - first, len(before) + last - first, dtype=torch.bool)
        for place, node in enumerate(range(first, last)):
            parent = self.parents[node]
            if parent >= first:
                sees[place] = sees[parent - first]
            elif parent != _ROOT:
                sees[place, [column[each] for each in self._line(parent)]] = True
            sees[place, len(before) + place] = True
        return self._added_by_kind(sees, [*(self.depths[node] for node in before), *self.depths[first:last]])

    def mask_behind(self, paths: Sequence[Sequence[int]], lengths: Sequence[int], before: Sequence[int]) -> Any:
        """The same for new tokens that are no nodes: `lengths[i]` of them behind path i, one path's after another's."""
        column = {node: place for place, node in enumerate(before)}
        sees = torch.zeros(sum(lengths), len(before) + sum(lengths), dtype=torch.bool)
        depths, first = [self.depths[node] for node in before], 0
        for path, length in zip(paths, lengths, strict=True):
            own, place = slice(first, first + length), len(before) + first
            sees[own, [column[node] for node in path]] = True
            sees[own, place : place + length] = torch.ones(length, length, dtype=torch.bool).tril()
            depths += range(len(path), len(path) + length)
            first += length
        return self._added_by_kind(sees, depths)

    def _line(self, node: int) -> list[int]:
        """A node and all before it on its branch."""
        line = []
        while node != _ROOT:
            line.append(node)
            node = self.parents[node]
        return line

    def _added_by_kind(self, sees: Tensor, depths: Sequence[int]) -> Any:
        """`sees` (new, all) as a mask, where `depths` (all,) say how far from the beginning each token is."""
        window, kinds = getattr(self._config, "sliding_window", None), getattr(self._config, "layer_types", None)
        if not window or (kinds and "sliding_attention" not in kinds):
            return self._added(sees)
        depth = torch.tensor(depths)
        near = sees & (depth[-len(sees) :, None] - depth[None, :] < window)
        if not kinds:
            return self._added(near)
        return {"full_attention": self._added(sees), "sliding_attention": self._added(near)}

    def _added(self, sees: Tensor) -> Tensor:
        dtype = self._like.dtype
        added = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        return added[None, None].to(self._like.device)


class PrefixTree:
    """Branches that were run under one state of the weights: their keys, values and outputs."""

    def __init__(self, model: PreTrainedModel, sites: ModelSites, keep: Sequence[int] = ()) -> None:
        """An empty tree. What the dense MLPs of the layers in `keep` read is kept at every node."""
        self._model, self._sites = model, sites
        self._branches = Branches(model)
        parameter = next(model.parameters())
        empty = parameter.detach().new_zeros(1, sites.kv_heads, 0, sites.head_dim)
        # Over all nodes that were run, and with room for more behind them:
        self._layers: KeysAndValues = [(empty, empty) for _ in range(sites.layers)]
        self.final = parameter.detach().new_zeros(0, sites.width)  # (nodes, width), as the unembedding reads it
        self.mlp_inputs = {layer: self.final for layer in keep if not sites.experts_of(layer)}  # (nodes, width) each
        self._ran = 0  # nodes that were run

    def __len__(self) -> int:
        """How many tokens it holds."""
        return len(self._branches)

    def extend(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Each row's nodes, a token; what the tree did not hold is run now, outside of any graph."""
        paths = [self._branches.add(row) for row in rows]
        # Tensors of inference mode could not be used where gradients are taken later.
        with torch.inference_mode(False), torch.no_grad():
            while self._ran < len(self):  # an interrupted pass is made up for by the next one
                self._run(self._ran, min(self._ran + _AT_ONCE, len(self)))
        return paths

    def past(self, paths: Sequence[Sequence[int]]) -> tuple[KeysAndValues, list[list[int]]]:
        """Keys and values of some rows, padded on the left to the longest, and which of them count, (rows, length)."""
        longest = max(map(len, paths))
        real = [[0] * (longest - len(path)) + [1] * len(path) for path in paths]
        padded = [[0] * (longest - len(path)) + list(path) for path in paths]
        index = torch.tensor(padded, device=self.final.device).reshape(-1)
        found = []
        for keys, values in self._layers:
            taken = [part[0].index_select(1, index) for part in (keys, values)]  # (kv_heads, rows · length, size)
            shape = (len(taken[0]), len(paths), longest, -1)
            found.append((taken[0].view(shape).transpose(0, 1), taken[1].view(shape).transpose(0, 1)))
        return found, real

    def past_once(self, paths: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[KeysAndValues, Any]:
        """Keys and values of all nodes of some paths, once each, in one row; and the mask of `Branches.mask_behind`."""
        before = sorted({node for path in paths for node in path})
        index = torch.tensor(before, dtype=torch.int64, device=self.final.device)
        past = [(keys.index_select(2, index), values.index_select(2, index)) for keys, values in self._layers]
        return past, self._branches.mask_behind(paths, lengths, before)

    # ------------------------------------------------------------------------------------------------- internal

    def _run(self, first: int, last: int) -> None:
        """Run the nodes from `first` to before `last`; all before them were run."""
        branches, device = self._branches, self.final.device
        before = branches.before(first, last)
        index = torch.tensor(before, dtype=torch.int64, device=device)
        cache = FixedCache(
            self._model, [(keys.index_select(2, index), values.index_select(2, index)) for keys, values in self._layers]
        )
        read: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for layer in self.mlp_inputs:
                reader = self._sites.weight(self._sites.mlp_part(layer, "up")).module
                handle = reader.register_forward_pre_hook(lambda _, args, layer=layer: read.update({layer: args[0][0]}))
                hooks.callback(handle.remove)
            output = self._model.base_model(
                input_ids=torch.tensor([branches.tokens[first:last]], device=device),
                past_key_values=cache,
                attention_mask=branches.mask(first, last, before),
                position_ids=torch.tensor([branches.depths[first:last]], device=device),
            )
        for layer, found in read.items():
            self.mlp_inputs[layer] = _put(self.mlp_inputs[layer], first, found, 0)
        for layer, (keys, values) in enumerate(self._layers):
            new_keys, new_values = cache.new[layer]
            self._layers[layer] = (_put(keys, first, new_keys, 2), _put(values, first, new_values, 2))
        self.final = _put(self.final, first, output.last_hidden_state[0], 0)
        self._ran = last


def _put(kept: Tensor, first: int, new: Tensor, dim: int) -> Tensor:
    """What was kept, with `new` in it from place `first` of a dimension on; a longer copy where it had no room."""
    last = first + new.shape[dim]
    if kept.shape[dim] < last:
        shape = list(new.shape)
        shape[dim] = max(last, 2 * first, _AT_ONCE)
        longer = new.new_empty(shape)
        longer.narrow(dim, 0, first).copy_(kept.narrow(dim, 0, first))
        kept = longer
    kept.narrow(dim, first, last - first).copy_(new)
    return kept
