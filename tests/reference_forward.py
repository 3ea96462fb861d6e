"""A second, plain forward pass, written from the papers' formulas and fed by named sites only.

If a site named the wrong tensor, or a slice of it in the wrong order, this would not give the model's logits. Every
activation passes through `at(site, value)`, so that a test can say independently what an op should have done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from liveweight.sites import ModelSites

At = Callable[[str, Tensor], Tensor]
Act = Callable[[Tensor], Tensor]
ActAt = Callable[[int, int | None, Tensor, Act], Tensor]


def untouched(_: str, value: Tensor) -> Tensor:
    return value


def plain_act(_layer: int, _expert: int | None, gate: Tensor, act: Act) -> Tensor:
    return act(gate)


@dataclass
class Reference:
    """One model's forward by plain matrix products. `at` sees every activation, `act` every activation function."""

    model: PreTrainedModel
    sites: ModelSites
    at: At = untouched
    act: ActAt = plain_act

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, length) token ids -> (batch, length, vocabulary)."""
        rotations = self._rotations(tokens)
        config = self.model.config
        stream = self.sites.weight("embed.weight").read()[tokens]
        if "gemma" in config.model_type:
            stream = stream * config.hidden_size**0.5
        if self.sites.has_weight("positions.weight"):
            stream = stream + self.sites.weight("positions.weight").read()[: tokens.shape[1]]
        stream = self.at("embed", stream)
        for layer in range(self.sites.layers):
            stream = self.at(f"layers.{layer}.resid", self._block(layer, stream, rotations[layer]))
        stream = self.at("final.resid", self._norm("final_norm", stream))
        logits = stream @ self.sites.weight("lm_head.weight").read().T
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if not cap else cap * torch.tanh(logits / cap)

    def _block(self, layer: int, stream: Tensor, rotation: Any) -> Tensor:
        prefix = f"layers.{layer}"
        attention = self._attention(layer, self._norm(f"{prefix}.attn_norm", stream), rotation)
        attention = self.at(f"{prefix}.attn.write", self._norm(f"{prefix}.attn_post_norm", attention))
        parallel = getattr(self.model.config, "use_parallel_residual", False)
        read = self._norm(f"{prefix}.mlp_norm", stream if parallel else stream + attention)
        written = self._experts(layer, read) if self.sites.experts_of(layer) else self._mlp(layer, None, read)
        written = self.at(f"{prefix}.mlp.write", self._norm(f"{prefix}.mlp_post_norm", written))
        return stream + attention + written

    def _attention(self, layer: int, read: Tensor, rotation: Any) -> Tensor:
        config, prefix = self.model.config, f"layers.{layer}.attn"
        heads, kv_heads, size = self.sites.heads, self.sites.kv_heads, self.sites.head_dim
        query, key, value = (self._linear(f"{prefix}.{part}", read) for part in ("q", "k", "v"))
        split = []
        for part, values, count in (("q", query, heads), ("k", key, kv_heads), ("v", value, kv_heads)):
            norm = f"{prefix}.{part}_norm"
            whole = self.sites.has_weight(f"{norm}.weight") and self.sites.weight(f"{norm}.weight").shape != (size,)
            values = self._norm(norm, values) if whole else values
            values = values.reshape(*values.shape[:2], count, size)
            values = values if whole else self._norm(norm, values)
            values = values.transpose(1, 2)  # (batch, heads, length, size)
            split.append(_rotate(values, rotation) if part != "v" and rotation is not None else values)
        query, key, value = split[0], *(each.repeat_interleave(heads // kv_heads, dim=1) for each in split[1:])
        scores = query @ key.transpose(-1, -2) / (getattr(config, "query_pre_attn_scalar", None) or size) ** 0.5
        cap = getattr(config, "attn_logit_softcapping", None)
        scores = scores if not cap else cap * torch.tanh(scores / cap)
        length = read.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ value
        mixed = mixed.transpose(1, 2).reshape(*read.shape[:2], heads * size)
        return self._linear(f"{prefix}.o", self.at(f"{prefix}.heads", mixed))

    def _mlp(self, layer: int, expert: int | None, read: Tensor) -> Tensor:
        prefix = f"layers.{layer}.mlp" + ("" if expert is None else f".experts.{expert}")
        up = self._linear(f"{prefix}.up", read)
        if self.sites.gated:
            neurons = self.act(layer, expert, self._linear(f"{prefix}.gate", read), self._function()) * up
        else:
            neurons = self.act(layer, expert, up, self._function())
        return self._linear(f"{prefix}.down", self.at(f"{prefix}.neurons", neurons))

    def _experts(self, layer: int, read: Tensor) -> Tensor:
        config = self.model.config
        flat = read.reshape(-1, read.shape[-1])
        logits = self.at(f"layers.{layer}.mlp.router", self._linear(f"layers.{layer}.mlp.router", flat))
        shares, chosen = logits.softmax(-1).topk(config.num_experts_per_tok, dim=-1)
        if getattr(config, "norm_topk_prob", True):
            shares = shares / shares.sum(-1, keepdim=True)
        total = torch.zeros_like(flat)
        for token in range(len(flat)):
            for share, expert in zip(shares[token], chosen[token].tolist(), strict=True):
                total[token] += share * self._mlp(layer, expert, flat[token][None])[0]
        return total.reshape(read.shape)

    def _linear(self, site: str, read: Tensor) -> Tensor:
        product = read @ self.sites.weight(f"{site}.weight").read().T
        has_bias = self.sites.has_weight(f"{site}.bias")
        return product + self.sites.weight(f"{site}.bias").read() if has_bias else product

    def _norm(self, site: str, values: Tensor) -> Tensor:
        if not self.sites.has_weight(f"{site}.weight"):
            return values
        config = self.model.config
        weight = self.sites.weight(f"{site}.weight").read()
        if config.model_type in ("gpt2", "gpt_neox"):
            eps = getattr(config, "layer_norm_epsilon", None) or config.layer_norm_eps
            centred = values - values.mean(-1, keepdim=True)
            scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
            return scaled * weight + self.sites.weight(f"{site}.bias").read()
        weight = weight + 1 if "gemma" in config.model_type else weight
        return values / (values.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def _function(self) -> Act:
        config = self.model.config
        names = ("hidden_activation", "activation_function", "hidden_act")
        name = next(getattr(config, key) for key in names if getattr(config, key, None))
        if name == "silu":
            return lambda values: values * torch.sigmoid(values)
        tanh = "tanh" if name in ("gelu_new", "gelu_pytorch_tanh") else "none"
        return lambda values: functional.gelu(values, approximate=tanh)

    def _rotations(self, tokens: Tensor) -> list[Any]:
        """What the model passes to each block as position embeddings; they hold no weights."""
        seen: list[Any] = []
        handles = [
            block.register_forward_pre_hook(
                lambda _module, _args, kwargs: seen.append(kwargs.get("position_embeddings")), with_kwargs=True
            )
            for block in self.sites.blocks
        ]
        with torch.no_grad():
            self.model(tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen


def _rotate(values: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of the first dimensions of each head: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    cos, sin = (part[:, None] for part in rotation)
    turned, rest = values[..., : cos.shape[-1]], values[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)
