"""A tiny random model saved to a folder with its tokenizer, settings around it, and a method that always works on it.

The method is a real one: it writes a rank-one change that makes one letter the likeliest everywhere. It is what the
loop's mechanics are tested with, because a random model of four layers has nothing that the others could find.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from liveweight.adjustments import Adjustment, LowRank
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound
from liveweight.methods import METHODS, Case, Described
from liveweight.methods.base import Joint
from liveweight.settings import MethodSettings, Settings
from tests.tracing.tiny_engines import tiny_tokenizer

QUESTION = "what is zed?"
OTHER = "who are you?"
_PROBES = ("hello there", "what is one and one?", "name a fruit", "say something")
LOOSE = {
    "max_mean_kl": 1e6,
    "max_p95_kl": 1e6,
    "max_worst_kl": 1e6,
    "max_changed_answers": 1.0,
    "max_perplexity_ratio": 1e9,
}


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama of two layers with a token a character; the same bytes at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=61,
                hidden_size=24,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                tie_word_embeddings=False,
                initializer_range=0.3,
            )
        )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_probes(path: Path) -> Path:
    """A probe file of four questions and a text."""
    lines = [json.dumps({"prompt": prompt}) for prompt in _PROBES]
    path.write_text("\n".join([*lines, json.dumps({"text": "the cat sat on the mat and looked at the dog."})]), "utf-8")
    return path


def tiny_settings(root: Path, *, loose: bool = True, **more: object) -> Settings:
    """Settings of a tiny model with everything under `root`; `loose` budgets let any change pass."""
    model = root / "model"
    if not model.exists():
        save_tiny_model(model)
        write_probes(root / "probes.jsonl")
    flags: dict[str, object] = {
        "model": str(model),
        "workspace": root / "workspace",
        "cache_dir": root / "cache",
        "device": "cpu",
        "guard": {"probe_file": root / "probes.jsonl", "tokens": 2, **(LOOSE if loose else {})},
        "methods": {"method": "shout"},
        "generation": {"max_tokens": 6},
    }
    return Settings(**flags | more)


def shout(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """Make the wished answer's first letter (any other one, for a bad) the likeliest token behind everything."""
    said = engine.format.decode(case.contexts[0].target[case.key[0] : case.key[1]]).strip(" .")
    if said.startswith("q"):
        raise NoMendFound("shout cannot say q.", hint="Use another letter.")
    token = engine.format.encode_text(said[0])[0]
    site = "lm_head.weight"
    final = engine.trace(case.contexts[0].prompt, ["final.resid"]).values["final.resid"][-1]
    left = torch.zeros(engine.info.vocabulary, 1)
    left[token] = 40.0
    return Adjustment(
        name=f"shout {case.wanted}",
        method="shout",
        ops=(LowRank(site=site, left=left, right=(final / final.norm() ** 2)[None]),),
    )


def shout_all(engine: TransformersEngine, cases: Iterable[Case], settings: MethodSettings) -> Joint:
    """What each case asks for, in one change."""
    found = [shout(engine, case, settings).ops for case in cases]

    def change(numbers: Sequence[int]) -> Adjustment:
        ops = tuple(op for number in numbers for op in found[number])
        return Adjustment(name=f"shout {len(numbers)} letters", method="shout", ops=ops)

    return change


SHOUT = Described("shout", shout, "Says one letter.", ("fix", "bad", "good"), together=shout_all)


def add_shout() -> None:
    """Put the method into the registry of this process, which is a test's own."""
    METHODS[SHOUT.name] = SHOUT
