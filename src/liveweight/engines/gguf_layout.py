"""What a GGUF file's metadata and tensors mean in the checkpoint's own coordinates.

Owns the architectures that can be read from GGUF, each one's configuration, and for every parameter of the model the
GGUF tensors it is made of and what the writer of the file did to them: rows of rotary queries and keys interleaved,
one added to norms, matrices transposed. Knows nothing of caches, files on disk or tokenizers. The layout is that of
the GGUF specification and of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from liveweight.errors import ModelUnusable, UnsupportedArchitecture

Array = npt.NDArray[np.float32]
Metadata = Mapping[str, Any]  # GGUF key -> value

# A parameter's name inside its layer -> the GGUF tensors that are joined along their second axis from the end.
_DECODER = {
    "input_layernorm.weight": ("attn_norm.weight",),
    "post_attention_layernorm.weight": ("ffn_norm.weight",),
    **{f"self_attn.{to}_proj.{kind}": (f"attn_{of}.{kind}",) for kind in ("weight", "bias") for to, of in
       (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
    **{f"mlp.{part}_proj.{kind}": (f"ffn_{part}.{kind}",) for kind in ("weight", "bias") for part in
       ("gate", "up", "down")},
}  # fmt: skip
_HEAD_NORMS = {f"self_attn.{part}_norm.weight": (f"attn_{part}_norm.weight",) for part in ("q", "k")}
_SANDWICH_NORMS = {  # Gemma 2 and 3 normalise before and after each block
    "post_attention_layernorm.weight": ("post_attention_norm.weight",),
    "pre_feedforward_layernorm.weight": ("ffn_norm.weight",),
    "post_feedforward_layernorm.weight": ("post_ffw_norm.weight",),
}
_EXPERTS = {
    "mlp.gate.weight": ("ffn_gate_inp.weight",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
}
_FUSED = {"self_attn.qkv_proj.weight": ("attn_qkv.weight",), "mlp.gate_up_proj.weight": ("ffn_up.weight",)}
_GPT2 = {
    f"{to}.{kind}": (f"{of}.{kind}",)
    for kind in ("weight", "bias")
    for to, of in (
        ("ln_1", "attn_norm"),
        ("ln_2", "ffn_norm"),
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
    )
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GPT2_TOP = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Layout:
    """How one GGUF architecture is laid out."""

    model_type: str
    config: Callable[[_Reader], dict[str, Any]]
    inner: Mapping[str, tuple[str, ...]]
    layers: str = "model.layers."
    top: Mapping[str, str] = field(default_factory=lambda: _TOP)
    rotary_rows_interleaved: bool = False
    norms_hold_one_more: bool = False
    transposed: tuple[str, ...] = ()  # ends of parameter names


@dataclass(frozen=True)
class Recipe:
    """One parameter: the GGUF tensors it is made of, and how."""

    parameter: str
    tensors: tuple[str, ...]
    interleaved_heads: int = 0  # how many heads' rows are interleaved; 0 if they are not
    minus_one: bool = False
    transpose: bool = False

    def build(self, parts: list[Array]) -> Array:
        """The parameter's values from its tensors' dequantised values."""
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)
        if self.interleaved_heads:
            # The file pairs (i, i + half) of each head's rotation in neighbouring rows; the checkpoint keeps halves.
            half = whole.shape[0] // self.interleaved_heads // 2
            whole = whole.reshape(self.interleaved_heads, half, 2, *whole.shape[1:]).swapaxes(1, 2).reshape(whole.shape)
        if self.minus_one:
            whole = whole - np.float32(1)
        return np.ascontiguousarray(whole.T if self.transpose else whole, dtype=np.float32)


class _Reader:
    """A file's metadata under its architecture's prefix."""

    def __init__(self, metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.metadata = metadata
        self.shapes = shapes
        self.prefix = str(metadata["general.architecture"])

    def need(self, key: str) -> Any:
        try:
            return self.metadata[f"{self.prefix}.{key}"]
        except KeyError:
            raise ModelUnusable(
                f"This GGUF file has no {self.prefix}.{key} in its metadata.",
                hint="Convert the model again with a current converter, or use its safetensors checkpoint.",
            ) from None

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.prefix}.{key}", default)

    def vocabulary(self) -> int:
        return self.shapes["token_embd.weight"][0]

    def tokens(self) -> dict[str, Any]:
        names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        return {name: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}

    def rope(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(self.get("rope.freq_base", 10_000.0))}
        scaling = self.get("rope.scaling.type", "none")
        if scaling == "linear":
            rope |= {"rope_type": "linear", "factor": float(self.need("rope.scaling.factor"))}
        elif scaling != "none":
            raise ModelUnusable(
                f"This GGUF file scales its positions by {scaling!r}, which cannot be read from a GGUF yet.",
                hint="Use the model's safetensors checkpoint instead.",
            )
        return rope


def _decoder(file: _Reader) -> dict[str, Any]:
    heads = file.need("attention.head_count")
    width = file.need("embedding_length")
    return {
        "vocab_size": file.vocabulary(),
        "hidden_size": width,
        "intermediate_size": file.need("feed_forward_length"),
        "num_hidden_layers": file.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "head_dim": file.get("attention.key_length", file.get("rope.dimension_count", width // heads)),
        "max_position_embeddings": file.need("context_length"),
        "rms_norm_eps": float(f"{file.need('attention.layer_norm_rms_epsilon'):.6g}"),  # stored in single precision
        "rope_parameters": file.rope(),
        "tie_word_embeddings": "output.weight" not in file.shapes,
        **file.tokens(),
    }


def _llama(file: _Reader) -> dict[str, Any]:
    if file.get("expert_count"):
        raise UnsupportedArchitecture(
            "This GGUF file is a Mixtral-like mixture of experts, which cannot be read from a GGUF.",
            hint="Use the model's safetensors checkpoint instead.",
        )
    biases = {
        "attention_bias": "blk.0.attn_q.bias" in file.shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.shapes,
    }
    return _decoder(file) | biases


def _qwen3_moe(file: _Reader) -> dict[str, Any]:
    return _decoder(file) | {
        "moe_intermediate_size": file.need("expert_feed_forward_length"),
        "num_experts": file.need("expert_count"),
        "num_experts_per_tok": file.need("expert_used_count"),
        "norm_topk_prob": True,  # every released model does, and the format does not say
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma2(file: _Reader) -> dict[str, Any]:
    config = _decoder(file)
    # The 27B model alone (46 layers) scales its queries by the width, and the format does not say.
    whole = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "query_pre_attn_scalar": whole if config["num_hidden_layers"] == 46 else config["head_dim"],
        "sliding_window": file.get("attention.sliding_window", 4096),
        "attn_logit_softcapping": float(file.get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(file.get("final_logit_softcapping", 30.0)),
    }


def _gemma3(file: _Reader) -> dict[str, Any]:
    config = _decoder(file)
    whole = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "query_pre_attn_scalar": whole if config["num_hidden_layers"] == 62 else config["head_dim"],  # 62: the 27B
        "sliding_window": file.get("attention.sliding_window", 1024),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }


def _phi3(file: _Reader) -> dict[str, Any]:
    config = _decoder(file)
    head = config["hidden_size"] // config["num_attention_heads"]
    config["rope_parameters"]["partial_rotary_factor"] = file.get("rope.dimension_count", head) / head
    del config["head_dim"]  # always width / heads in this architecture
    return config | {
        "original_max_position_embeddings": config["max_position_embeddings"],
        "sliding_window": file.get("attention.sliding_window") or None,
    }


def _gpt2(file: _Reader) -> dict[str, Any]:
    return {
        "vocab_size": file.vocabulary(),
        "n_embd": file.need("embedding_length"),
        "n_inner": file.need("feed_forward_length"),
        "n_layer": file.need("block_count"),
        "n_head": file.need("attention.head_count"),
        "n_positions": file.need("context_length"),
        "layer_norm_epsilon": float(f"{file.need('attention.layer_norm_epsilon'):.6g}"),
        "tie_word_embeddings": "output.weight" not in file.shapes,
        **file.tokens(),
    }


LAYOUTS: dict[str, Layout] = {
    "llama": Layout("llama", _llama, _DECODER, rotary_rows_interleaved=True),
    "qwen2": Layout("qwen2", lambda file: _without(_decoder(file), "head_dim"), _DECODER),
    "qwen3": Layout("qwen3", _decoder, _DECODER | _HEAD_NORMS),
    "qwen3moe": Layout("qwen3_moe", _qwen3_moe, _DECODER | _HEAD_NORMS | _EXPERTS),
    "gemma2": Layout("gemma2", _gemma2, _DECODER | _SANDWICH_NORMS, norms_hold_one_more=True),
    "gemma3": Layout("gemma3_text", _gemma3, _DECODER | _SANDWICH_NORMS | _HEAD_NORMS, norms_hold_one_more=True),
    "phi3": Layout("phi3", _phi3, _DECODER | _FUSED),
    "gpt2": Layout(
        "gpt2",
        _gpt2,
        _GPT2,
        layers="transformer.h.",
        top=_GPT2_TOP,
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
}


def _without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def layout_of(metadata: Metadata) -> Layout:
    """The layout of the file's architecture. Raises UnsupportedArchitecture where there is none."""
    architecture = metadata.get("general.architecture")
    if architecture not in LAYOUTS:
        raise UnsupportedArchitecture(
            f"GGUF files of the architecture {architecture!r} cannot be read.",
            hint=f"Readable are {', '.join(sorted(LAYOUTS))}. For others use the safetensors checkpoint.",
            architecture=architecture,
        )
    return LAYOUTS[str(architecture)]


def configuration(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The content of `config.json`, without the class name. `shapes` are the tensors', slowest axis first."""
    layout = layout_of(metadata)
    if "token_embd.weight" not in shapes:
        raise ModelUnusable("This GGUF file has no token_embd.weight.", hint="It is not a whole language model.")
    return {"model_type": layout.model_type, **layout.config(_Reader(metadata, shapes))}


def llama3_rope(divisors: Array, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The rope parameters whose frequency divisors are `divisors` (half a head's width).

    Llama 3.1 and later keep only these divisors in a GGUF. They are made from four numbers, three of which are the
    same in every released model; the fourth is the largest divisor. Raises ModelUnusable if that does not fit.
    """
    found = {
        **rope,
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    half = divisors.shape[0]
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(half) / half)
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / found["factor"] + smooth)
    if not np.allclose(expected, divisors, rtol=1e-3):
        raise ModelUnusable(
            "This GGUF file's rope_freqs.weight is not of the Llama 3 form.",
            hint="Use the model's safetensors checkpoint instead.",
        )
    return found


def recipes(
    metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> list[Recipe]:
    """How each parameter in `wanted` (name -> shape) is made. Raises ModelUnusable naming what is missing or left."""
    layout = layout_of(metadata)
    heads = metadata.get(f"{metadata['general.architecture']}.attention.head_count", 0)
    key_heads = metadata.get(f"{metadata['general.architecture']}.attention.head_count_kv", heads)
    made: list[Recipe] = []
    missing: list[str] = []
    for name in wanted:
        if name in layout.top:
            tensors: tuple[str, ...] = (layout.top[name],)
        else:
            layer, _, inner = name.removeprefix(layout.layers).partition(".")
            tensors = tuple(f"blk.{layer}.{tensor}" for tensor in layout.inner.get(inner, (f"({name})",)))
        missing += [tensor for tensor in tensors if tensor not in shapes]
        rows = 0
        if layout.rotary_rows_interleaved and ".self_attn." in name:
            rows = heads if ".q_proj." in name else key_heads if ".k_proj." in name else 0
        made.append(
            Recipe(
                parameter=name,
                tensors=tensors,
                interleaved_heads=rows,
                minus_one=layout.norms_hold_one_more and name.endswith("norm.weight"),
                transpose=name.endswith(layout.transposed) if layout.transposed else False,
            )
        )
    used = {tensor for recipe in made for tensor in recipe.tensors} | {"rope_freqs.weight"}
    left = sorted(set(shapes) - used)
    if missing or left:
        raise ModelUnusable(
            f"This GGUF file does not hold what a {layout.model_type} model needs: "
            f"missing {missing[:3] or 'nothing'}, without a place {left[:3] or 'nothing'}.",
            hint="Use the model's safetensors checkpoint instead.",
            missing=missing,
            left=left,
        )
    return made
