"""Tiny, seeded, random models of every supported architecture: real transformers code, milliseconds a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 61
LAYERS = 3
WIDTH = 24
NEURONS = 40
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8  # so that heads · head_dim differs from the width wherever the architecture allows it

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_WIDE_HEADS = _SIZES | {"head_dim": HEAD_DIM}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}

FACTORIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_WIDE_HEADS, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_WIDE_HEADS, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_WIDE_HEADS)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_WIDE_HEADS)),
    "gemma3_text": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_WIDE_HEADS)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SIZES)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=NEURONS,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{name: size for name, size in _SIZES.items() if name != "num_key_value_heads"})
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_WIDE_HEADS, num_local_experts=5, num_experts_per_tok=2, sliding_window=None)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_WIDE_HEADS, **_EXPERTS, moe_intermediate_size=32, mlp_only_layers=[1], norm_topk_prob=True)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**_SIZES, **_EXPERTS, norm_topk_prob=False)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**_WIDE_HEADS | {"tie_word_embeddings": True})),
}
ARCHITECTURES = tuple(FACTORIES)
EXPERT_ARCHITECTURES = ("mixtral", "qwen3_moe", "olmoe")
DENSE_ARCHITECTURES = tuple(name for name in ARCHITECTURES if name not in EXPERT_ARCHITECTURES)


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode; the same bytes at every call with the same arguments.

    Every parameter is random, biases and norms too, so that a site that reads the wrong one cannot pass unseen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FACTORIES[name]()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.5 if parameter.dim() == 1 else 1.0 / parameter.shape[-1] ** 0.5
                mean = 1.0 if parameter.dim() == 1 else 0.0
                parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval().requires_grad_(False)


def tiny_tokens(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The logits (batch, length, vocabulary) of one forward without a cache."""
    with torch.no_grad():
        output: torch.Tensor = model(tokens, use_cache=False).logits
    return output


def bytes_of(model: PreTrainedModel) -> dict[str, bytes]:
    """Every parameter's bytes by name."""
    return {
        name: parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
    }
