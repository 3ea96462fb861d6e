"""Tiny models on disk: as folders, and as GGUF files the way llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

VOCABULARY = 260  # 256 bytes, a merge or two, and three control tokens
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_untied_biased": {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma2": {"model_type": "gemma2", "tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 20_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2"},
}
ARCHITECTURES = {name: name for name in CONFIGS} | {"llama_untied_biased": "llama"}


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose every parameter differs from its initial value, norms included."""
    values = _DECODER | CONFIGS[name]
    if name == "gpt2":
        values = {
            "model_type": "gpt2",
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_inner": 96,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
    if name == "phi3":
        del values["head_dim"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=letters[0])


def save_folder(path: Path, name: str = "llama") -> PreTrainedModel:
    """Write `tiny(name)` as `save_pretrained` does, with a tokenizer."""
    model = tiny(name)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model


def write(
    path: Path,
    name: str = "llama",
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre_tokenizer: str = "smollm",
    extra: dict[str, np.ndarray] | None = None,
    leave_out: str = "",
    architecture: str = "",
) -> PreTrainedModel:
    """Write `tiny(name)` as a GGUF file and return the model that was written."""
    model = tiny(name)
    config = model.config
    arch = architecture or ARCHITECTURES[name]
    writer = gguf.GGUFWriter(path, arch)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", heads)
    writer.add_name(f"tiny {name}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(96)
    writer.add_head_count(heads)
    writer.add_vocab_size(VOCABULARY)
    if name == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(key_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(20_000.0)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_rope_dimension_count(width)
        writer.add_key_length(width)
        writer.add_value_length(width)
    if name in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _add_tokenizer(writer, pre_tokenizer)
    for tensor, values in _tensors(model, arch, heads, key_heads).items():
        if tensor == leave_out:
            continue
        if kind != gguf.GGMLQuantizationType.F32 and values.ndim > 1 and values.shape[-1] % 32 == 0:
            writer.add_tensor(tensor, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor, values)
    for tensor, values in (extra or {}).items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: gguf.GGUFWriter, pre_tokenizer: str) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    space = bytes_to_unicode()[ord(" ")]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, space + space]
    assert len(tokens) == VOCABULARY
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_token_merges([f"{space} {space}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def _tensors(model: PreTrainedModel, arch: str, heads: int, key_heads: int) -> dict[str, np.ndarray]:
    """The model's parameters under GGUF names, in GGUF layout. Names come from the gguf package's own map."""
    keys = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(keys[arch], model.config.num_hidden_layers)
    out: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy().copy()
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            gate, up = np.split(values, 2, axis=1)
            out[f"blk.{block}.ffn_gate_exps.weight"] = np.ascontiguousarray(gate)
            out[f"blk.{block}.ffn_up_exps.weight"] = np.ascontiguousarray(up)
            continue
        stem = name if name.endswith("proj") and "experts" in name else name.rpartition(".")[0]
        suffix = ".weight" if stem == name else "." + name.rpartition(".")[2]
        found = names.get_name(stem)
        assert found is not None, name
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            n = heads if ".q_proj." in name else key_heads
            values = values.reshape(n, 2, values.shape[0] // n // 2, *values.shape[1:]).swapaxes(1, 2)
            values = values.reshape(parameter.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.T
        out[found + suffix] = np.ascontiguousarray(values)
    return out
