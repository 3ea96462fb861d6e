"""Engines around tiny models, with a tokenizer of as many characters as they have tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from liveweight.engines.fingerprints import tensors_sha256
from liveweight.engines.model_source import LoadedModel, ModelSource
from liveweight.engines.transformers import TransformersEngine
from tiny_models import VOCABULARY, tiny_model

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,;:!?'-()\n\"/%&+=_*#$"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character: small letters, digits, punctuation; a character beyond them is the padding token."""
    characters = {character: 3 + place for place, character in enumerate(CHARACTERS)}
    assert len(characters) == VOCABULARY - 3
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<start>": 1, "<end>": 2} | characters, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<pad>"
    )


def engine_around(model: PreTrainedModel, cache_dir: Path, name: str = "tiny") -> TransformersEngine:
    """An engine of a model that is in memory; its cache is a folder of the test's own."""
    source = ModelSource(name, "folder", cache_dir / name, cache_dir)
    return TransformersEngine(LoadedModel(model, tiny_tokenizer(), source, tensors_sha256(model.named_parameters())))


def tiny_engine(
    architecture: str, cache_dir: Path, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TransformersEngine:
    """An engine of a tiny random model."""
    return engine_around(tiny_model(architecture, dtype, seed), cache_dir, f"tiny-{architecture}")
