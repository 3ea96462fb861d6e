"""The table of architectures: which module plays which part.

Owns one entry per architecture, by the `model_type` of its config; adding one is adding one entry. Knows nothing of
tensors: `model_sites.py` reads the table against a live model and says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Split = Literal["whole", "halves", "qkv", "interleaved"]


@dataclass(frozen=True)
class Piece:
    """Where a weight lives: a module of the block, one of its parameters, and which part of that parameter.

    `split`: `halves` is two parts stacked over the outputs, `qkv` is queries, keys and values stacked in that order,
    `interleaved` is the same three but stacked within every head. `transposed` is (in, out) storage. `stacked` means
    that the first dimension counts experts.
    """

    module: str
    parameter: str = "weight"
    split: Split = "whole"
    part: int = 0
    transposed: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Architecture:
    """One architecture's map. Paths are relative to the model, or to a block where they are inside one."""

    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    positions: str = ""  # learned position embeddings, where there are any
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    attention: Mapping[str, Piece] = field(default_factory=dict)  # q, k, v, o
    mlp: Mapping[str, Piece] = field(default_factory=dict)  # gate, up, down; no gate where the MLP is not gated
    activation: str = "mlp.act_fn"
    experts: Mapping[str, Piece] = field(default_factory=dict)  # gate, up, down, in the layers that have experts
    experts_module: str = ""
    experts_activation: str = ""
    router: str = ""
    router_renormalises: bool | None = None  # the chosen experts' shares; None: the router's own `norm_topk_prob`
    norms: Mapping[str, str] = field(default_factory=dict)  # site part -> module
    norm_kind: Literal["rms", "rms_plus_one", "layer"] = "rms"

    @property
    def read_norm(self) -> str:
        """The part name of the norm before the MLP, empty where the MLP reads the stream itself."""
        return "mlp_norm" if "mlp_norm" in self.norms else ""

    @property
    def write_norm(self) -> str:
        """The part name of the norm after the MLP, empty where it writes into the stream itself."""
        return "mlp_post_norm" if "mlp_post_norm" in self.norms else ""


_SEPARATE_ATTENTION = {part: Piece(f"self_attn.{part}_proj") for part in ("q", "k", "v", "o")}
_GATED_MLP = {part: Piece(f"mlp.{part}_proj") for part in ("gate", "up", "down")}
_PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
_SANDWICH_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_FUSED_EXPERTS = {
    "gate": Piece("mlp.experts", "gate_up_proj", split="halves", part=0, stacked=True),
    "up": Piece("mlp.experts", "gate_up_proj", split="halves", part=1, stacked=True),
    "down": Piece("mlp.experts", "down_proj", stacked=True),
}

_LLAMA = Architecture(attention=_SEPARATE_ATTENTION, mlp=_GATED_MLP, norms=_PRE_NORMS)
_GEMMA_2 = replace(_LLAMA, norms=_SANDWICH_NORMS, norm_kind="rms_plus_one")
_EXPERTS = replace(
    _LLAMA,
    experts=_FUSED_EXPERTS,
    experts_module="mlp.experts",
    experts_activation="mlp.experts.act_fn",
    router="mlp.gate",
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, norms=_PRE_NORMS | _HEAD_NORMS),
    "gemma2": _GEMMA_2,
    "gemma3_text": replace(_GEMMA_2, norms=_SANDWICH_NORMS | _HEAD_NORMS),
    "phi3": replace(
        _LLAMA,
        attention={
            "q": Piece("self_attn.qkv_proj", split="qkv", part=0),
            "k": Piece("self_attn.qkv_proj", split="qkv", part=1),
            "v": Piece("self_attn.qkv_proj", split="qkv", part=2),
            "o": Piece("self_attn.o_proj"),
        },
        mlp={
            "gate": Piece("mlp.gate_up_proj", split="halves", part=0),
            "up": Piece("mlp.gate_up_proj", split="halves", part=1),
            "down": Piece("mlp.down_proj"),
        },
        activation="mlp.activation_fn",
    ),
    "olmo2": replace(
        _LLAMA,
        norms={
            "attn_post_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
        | _HEAD_NORMS,
    ),
    "gpt2": Architecture(
        blocks="transformer.h",
        embed="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        attention={
            "q": Piece("attn.c_attn", split="qkv", part=0, transposed=True),
            "k": Piece("attn.c_attn", split="qkv", part=1, transposed=True),
            "v": Piece("attn.c_attn", split="qkv", part=2, transposed=True),
            "o": Piece("attn.c_proj", transposed=True),
        },
        mlp={"up": Piece("mlp.c_fc", transposed=True), "down": Piece("mlp.c_proj", transposed=True)},
        activation="mlp.act",
        norms={"attn_norm": "ln_1", "mlp_norm": "ln_2"},
        norm_kind="layer",
    ),
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attention={
            "q": Piece("attention.query_key_value", split="interleaved", part=0),
            "k": Piece("attention.query_key_value", split="interleaved", part=1),
            "v": Piece("attention.query_key_value", split="interleaved", part=2),
            "o": Piece("attention.dense"),
        },
        mlp={"up": Piece("mlp.dense_h_to_4h"), "down": Piece("mlp.dense_4h_to_h")},
        activation="mlp.act",
        norms=_PRE_NORMS,
        norm_kind="layer",
    ),
    "mixtral": replace(_EXPERTS, router_renormalises=True),
    "qwen3_moe": replace(_EXPERTS, norms=_PRE_NORMS | _HEAD_NORMS),
    "olmoe": replace(_EXPERTS, norms=_PRE_NORMS | _HEAD_NORMS),
}
