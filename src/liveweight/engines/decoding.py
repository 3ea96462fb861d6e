"""One new token at a time, as fast as memory gives the weights.

Owns the key-value cache of one generation and the step that extends it. Two ways do the same sum:

- `ModuleDecoder` calls the model, whatever its architecture, with every hook that is on it;
- `DirectDecoder` does the Llama family's step (Llama, Mistral, Qwen2, Qwen3) itself, where no hook is active: matrix
  times vector on the live weights, a cache that is written in place, nothing built that is not needed. Several of
  them can read and step together.

Knows nothing of sampling, of chats, or of when weights change: its owner drops a decoder whose weights are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from liveweight.engines.prefix_tree import KeysAndValues, PrefixTree
from liveweight.engines.replay import keys_and_values, unembed
from liveweight.sites import ModelSites

_DIRECT = ("llama", "mistral", "qwen2", "qwen3")
CHUNK = 256  # tokens of a prompt that are read in one go, so that nobody waits for another's long prompt
_ROWS = 4  # of a product, at least, where several sequences are decoded together


class Decoder(Protocol):
    """Extends one sequence. `tokens` is what it has read so far."""

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Read some tokens and return the logits (vocabulary,) after the last of them."""
        ...


class ModuleDecoder:
    """Decodes by calling the model."""

    def __init__(self, model: PreTrainedModel, sites: ModelSites) -> None:
        """Begin an empty sequence."""
        self._model, self._sites = model, sites
        self.cache = DynamicCache(config=model.config)

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Read some tokens and return the logits (vocabulary,) after the last of them."""
        ids = torch.tensor([list(tokens)], device=self._model.device)
        output = self._model.base_model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        return unembed(self._model, self._sites, output.last_hidden_state[0, -1])


class DirectDecoder:
    """Decodes a Llama-like model without its modules; a prompt still goes through them."""

    @staticmethod
    def fits(model: PreTrainedModel, sites: ModelSites) -> bool:
        """Whether this model's step is the one written here."""
        config = model.config
        if config.model_type not in _DIRECT or model.device.type != "cpu":
            return False
        windows = getattr(config, "layer_types", None) or []
        plain = all(kind == "full_attention" for kind in windows) and not getattr(config, "sliding_window", None)
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            plain
            and rope.get("rope_type", "default") in ("default", "llama3", "linear")
            and not getattr(config, "final_logit_softcapping", None)
        )

    def __init__(self, model: PreTrainedModel, sites: ModelSites) -> None:
        """Begin an empty sequence."""
        self._model, self._sites = model, sites
        self._length = 0
        self._room = 0
        self._keys: list[Tensor] = []  # a layer: (1, kv_heads, room, head_dim)
        self._values: list[Tensor] = []
        config = model.config
        self._eps = float(config.rms_norm_eps)
        # Queries are scaled where they are turned, keys are not.
        scales = [sites.head_dim**-0.5] * sites.heads + [1.0] * sites.kv_heads
        self._scales = torch.tensor(scales, dtype=model.dtype)[:, None]
        self._rotary = model.base_model.get_submodule("rotary_emb")
        self._blocks = [_block(sites, layer) for layer in range(sites.layers)]
        self._embed = sites.weight("embed.weight").parameter.detach()
        self._head = sites.weight("lm_head.weight").parameter.detach()
        self._final_norm = sites.weight("final_norm.weight").parameter.detach()
        self.neurons: list[Tensor] = []  # of the last step, a layer: (neurons,)

    @property
    def begun(self) -> bool:
        """Whether it has read anything."""
        return self._length > 0

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Read some tokens and return the logits (vocabulary,) after the last of them."""
        if len(tokens) == 1 and self._length:
            return self._step(tokens[0])
        return self._read(tokens)

    def _read(self, tokens: Sequence[int]) -> Tensor:
        cache = DynamicCache(config=self._model.config)
        if self._length:
            for layer in range(self._sites.layers):
                cache.update(self._keys[layer][:, :, : self._length], self._values[layer][:, :, : self._length], layer)
        output = self._model.base_model(input_ids=torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True)
        self._take(keys_and_values(cache), self._length + len(tokens))
        return unembed(self._model, self._sites, output.last_hidden_state[0, -1])

    @staticmethod
    def read_together(decoders: Sequence[DirectDecoder], beginnings: Sequence[Sequence[int]]) -> Tensor:
        """Read the beginnings of several sequences of one model in one pass; the logits (B, vocabulary) after each.

        What they share is read once. A row's last bits depend on the others.
        """
        first = decoders[0]
        tree = PrefixTree(first._model, first._sites)
        paths = tree.extend(beginnings)
        for decoder, path in zip(decoders, paths, strict=True):
            decoder._take(tree.past([path])[0], len(path))
        return unembed(first._model, first._sites, tree.final[[path[-1] for path in paths]])

    def _take(self, read: KeysAndValues, length: int) -> None:
        """Own the keys and values (1, kv_heads, length, head_dim) of a sequence up to `length`."""
        self._grow(length, read[0][0].dtype)
        for layer, (keys, values) in enumerate(read):
            self._keys[layer][:, :, :length] = keys
            self._values[layer][:, :, :length] = values
        self._length = length

    def _grow(self, length: int, dtype: torch.dtype) -> None:
        if length < self._room:
            return
        room = max(256, 2 * length)
        sites = self._sites
        new = [torch.zeros(2, 1, sites.kv_heads, room, sites.head_dim, dtype=dtype) for _ in range(sites.layers)]
        for layer in range(sites.layers if self._keys else 0):
            new[layer][0, :, :, : self._length] = self._keys[layer][:, :, : self._length]
            new[layer][1, :, :, : self._length] = self._values[layer][:, :, : self._length]
        self._keys = [pair[0] for pair in new]
        self._values = [pair[1] for pair in new]
        positions = torch.arange(room)[None]
        cos, sin = self._rotary(torch.zeros(1, 1, 1, dtype=dtype), positions)
        half = cos.shape[-1] // 2
        self._cos = cos[0]  # (room, head_dim)
        # rotate_half(x)·sin = roll(x, half)·sin with the first half's sign turned
        self._sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        self._half = half
        self._room = room

    def _step(self, token: int) -> Tensor:
        sites = self._sites
        position = self._length
        self._grow(position + 1, self._keys[0].dtype)
        cos, sin = self._cos[position] * self._scales, self._sin[position] * self._scales
        heads, kv_heads, size = sites.heads, sites.kv_heads, sites.head_dim
        eps = self._eps
        hidden = self._embed[token]
        self.neurons = []
        for layer, block in enumerate(self._blocks):
            x = _normed(hidden, block.attn_norm, eps)
            q, k = block.q(x).view(heads, size), block.k(x).view(kv_heads, size)
            if block.q_norm is not None and block.k_norm is not None:
                q = F.rms_norm(q, (size,), block.q_norm, eps)
                k = F.rms_norm(k, (size,), block.k_norm, eps)
            both = torch.cat((q, k))
            both = torch.addcmul(both * cos, torch.roll(both, self._half, 1), sin)
            mixed = self._attend(layer, both, block.v(x).view(kv_heads, size))
            hidden = block.o(mixed, plus=hidden)
            x = _normed(hidden, block.mlp_norm, eps)
            neurons = block.act(block.gate(x)) * block.up(x)
            self.neurons.append(neurons)
            hidden = block.down(neurons, plus=hidden)
        self._length = position + 1
        return torch.mv(self._head, _normed(hidden, self._final_norm, eps))

    def _attend(self, layer: int, both: Tensor, value: Tensor) -> Tensor:
        """What the heads give for the next token, (heads · size,).

        `both` (heads + kv_heads, size) are its turned queries, scaled, and turned keys; `value` is (kv_heads, size).
        """
        sites, position = self._sites, self._length
        heads, kv_heads, size = sites.heads, sites.kv_heads, sites.head_dim
        keys, values = self._keys[layer][0], self._values[layer][0]
        keys[:, position] = both[heads:]
        values[:, position] = value
        # The query heads that share a key head stand as that head's queries: no key is repeated.
        queries = both[:heads].view(kv_heads, heads // kv_heads, size)
        likeness = queries @ keys[:, : position + 1].transpose(1, 2)
        return (likeness.softmax(-1) @ values[:, : position + 1]).reshape(-1)

    @staticmethod
    def feed_together(decoders: Sequence[DirectDecoder], tokens: Sequence[int]) -> Tensor:
        """One more token for each of several sequences of one model, which have all read something: (B, vocabulary).

        A row is bit for bit the same whatever the others are and however many: the products are those of four rows at
        least, where a matrix product sums each row in the same order (two or three rows would be summed otherwise, and
        take no less time).
        """
        first, count = decoders[0], len(decoders)
        sites, eps = first._sites, first._eps
        heads, kv_heads, size = sites.heads, sites.kv_heads, sites.head_dim
        for decoder in decoders:
            decoder._grow(decoder._length + 1, decoder._keys[0].dtype)
        turns = [(each._cos[each._length] * each._scales, each._sin[each._length] * each._scales) for each in decoders]
        cos, sin = (torch.stack(parts) for parts in zip(*turns, strict=True))  # (B, heads + kv_heads, size) each
        padding = [tokens[0]] * max(0, _ROWS - count)
        hidden = first._embed[[*tokens, *padding]]  # (R, width)
        mixed = hidden.new_zeros(len(hidden), heads * size)
        for layer, block in enumerate(first._blocks):
            x = _normed_rows(hidden, block.attn_norm, eps)
            q = block.q.rows(x)[:count].view(count, heads, size)
            k = block.k.rows(x)[:count].view(count, kv_heads, size)
            if block.q_norm is not None and block.k_norm is not None:
                q = F.rms_norm(q, (size,), block.q_norm, eps)
                k = F.rms_norm(k, (size,), block.k_norm, eps)
            both = torch.cat((q, k), dim=1)
            both = torch.addcmul(both * cos, torch.roll(both, first._half, 2), sin)
            values = block.v.rows(x)[:count].view(count, kv_heads, size)
            for row, decoder in enumerate(decoders):
                mixed[row] = decoder._attend(layer, both[row], values[row])
            hidden = block.o.rows(mixed, plus=hidden)
            x = _normed_rows(hidden, block.mlp_norm, eps)
            hidden = block.down.rows(block.act(block.gate.rows(x)) * block.up.rows(x), plus=hidden)
        for decoder in decoders:
            decoder._length += 1
        return (_normed_rows(hidden, first._final_norm, eps) @ first._head.t())[:count]


def _normed(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of one vector (width,); in float32 as three small operations instead of a dozen."""
    if hidden.dtype != torch.float32:
        return F.rms_norm(hidden, hidden.shape, weight, eps)
    return (hidden * weight).mul_((float(hidden.dot(hidden)) / hidden.shape[0] + eps) ** -0.5)


def _normed_rows(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of each row of (R, width)."""
    return F.rms_norm(hidden, hidden.shape[-1:], weight, eps)


class _Linear:
    """Matrix times vector on a live parameter; the parameter is written in place, so this never goes stale."""

    __slots__ = ("bias", "weight")

    def __init__(self, module: nn.Module, rows: int | None = None, columns: int | None = None) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.weight = weight.detach()[:rows, :columns]
        bias = getattr(module, "bias", None)
        self.bias = bias.detach()[:rows] if isinstance(bias, Tensor) else None

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if self.bias is not None:
            plus = self.bias if plus is None else plus + self.bias
        return torch.mv(self.weight, x) if plus is None else torch.addmv(plus, self.weight, x)

    def rows(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """The same for each row of (R, columns)."""
        if self.bias is not None:
            plus = self.bias if plus is None else plus + self.bias
        return torch.mm(x, self.weight.t()) if plus is None else torch.addmm(plus, x, self.weight.t())


@dataclass(frozen=True, slots=True)
class _Block:
    """One block's parts, looked up once."""

    attn_norm: Tensor
    mlp_norm: Tensor
    q: _Linear
    k: _Linear
    v: _Linear
    o: _Linear
    gate: _Linear
    up: _Linear
    down: _Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    act: Callable[[Tensor], Tensor]


def _block(sites: ModelSites, layer: int) -> _Block:
    def weight(part: str) -> Tensor:
        return sites.weight(f"layers.{layer}.{part}.weight").parameter.detach()

    def linear(part: str, rows: int | None = None, columns: int | None = None) -> _Linear:
        return _Linear(sites.weight(f"layers.{layer}.{part}.weight").module, rows, columns)

    def norm(part: str) -> Tensor | None:
        return weight(part) if sites.has_weight(f"layers.{layer}.{part}.weight") else None

    act = sites.activation_function(layer)
    assert act is not None, layer
    # The spare neurons behind the last one that writes something need not be run.
    neurons = sites.neurons_of(layer)
    writing = weight("mlp.down")[:, neurons:].any(0).nonzero()
    neurons += int(writing[-1]) + 1 if len(writing) else 0
    return _Block(
        attn_norm=weight("attn_norm"),
        mlp_norm=weight("mlp_norm"),
        q=linear("attn.q"),
        k=linear("attn.k"),
        v=linear("attn.v"),
        o=linear("attn.o"),
        gate=linear("mlp.gate", rows=neurons),
        up=linear("mlp.up", rows=neurons),
        down=linear("mlp.down", columns=neurons),
        q_norm=norm("attn.q_norm"),
        k_norm=norm("attn.k_norm"),
        act=act.forward,
    )


def decoder(model: PreTrainedModel, sites: ModelSites, *, direct: bool) -> Decoder:
    """A decoder for a new sequence; `direct` allows the fast way where it fits."""
    if direct and DirectDecoder.fits(model, sites):
        return DirectDecoder(model, sites)
    return ModuleDecoder(model, sites)


def chunks(tokens: Sequence[int]) -> list[Sequence[int]]:
    """A prompt in the pieces that are read between two looks at the gate."""
    return [tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK)]
