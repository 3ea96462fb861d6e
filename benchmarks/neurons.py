"""The neuron atlas: its time against the bare products, the shapes of an 8B model, and whether clamping proves labels.

    python benchmarks/neurons.py --json neurons.json

Three parts, `--only` chooses among them:

- `atlas`: every neuron of the model labelled (what it promotes, suppresses and reads), against nothing but the matrix
  products that this takes, layer by layer in turns; and the same with `--fast`, with how many top tokens agree.
- `large`: one layer of an 8B model (4,096 wide, 14,336 neurons, 128,256 tokens, random bfloat16 weights): the up
  projection's top tokens, exactly and fast, and what 32 layers would take.
- `clamp`: the 200 neurons whose write columns decode into one token most surely are held at their own largest
  activation on plain text, in neutral prompts: how much likelier their token becomes as the next one, against random
  neurons with their own tokens, and against random tokens under the same clamps.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

from liveweight.adjustments import Active
from liveweight.engines.model_source import LoadedModel, ModelSource
from liveweight.engines.transformers import TransformersEngine, load_engine
from liveweight.errors import LiveweightError
from liveweight.tracing.atlas import Atlas, read_atlas
from liveweight.tracing.clamping import adjustment
from liveweight.tracing.neuron_labels import packed_labels, read_directions, write_directions
from liveweight.tracing.plain_text import plain_text
from liveweight.tracing.unembedding import Coarse, decode, rows_at_once

PARTS = ("atlas", "large", "clamp")
CLAMPED, TOKENS = 200, 100  # neurons; random tokens for each of them
TEXT = 2048  # tokens of plain text that activations are read on
PROMPTS = (
    "I think that",
    "The next word is",
    "She looked at the",
    "There was a",
    "He told me about the",
    "This is a list of",
    "People often say",
    "We talked about",
)
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
LARGE_LAYERS = 32
_BLOCK = 4096  # tokens of one bare product


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the model: smollm2, a hub id, a folder or a .gguf file")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; unset leaves it to torch")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--layers", type=int, default=None, help="of the part atlas: only so many layers")
    parser.add_argument("--json", type=Path, default=None, help="where every figure is written")
    options = parser.parse_args()
    parts = options.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}")
    data: dict[str, Any] = {}
    try:
        engine = load_engine(options.model, threads=options.threads)
        data |= {"model": engine.info.name, "threads": torch.get_num_threads()}
        with tempfile.TemporaryDirectory() as folder:
            if "atlas" in parts:
                data["atlas"] = timed_atlas(engine, Path(folder), options.layers or engine.sites.layers)
            if "clamp" in parts:
                data["clamp"] = clamps(engine)
            data["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the model itself
            if "large" in parts:
                data["large"] = large(engine, Path(folder))
    except LiveweightError as error:
        print(f"{error.message} {error.hint}", file=sys.stderr)
        return error.exit_code
    print(table(data))
    if options.json is not None:
        options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return 0


# ------------------------------------------------------------------------------------------------------ the atlas


def timed_atlas(engine: TransformersEngine, folder: Path, layers: int) -> dict[str, Any]:
    """Seconds of the bare products, of the labels, of the fast labels; layer by layer in turns."""
    spent: dict[str, list[float]] = {"products": [], "labels": [], "fast labels": []}
    unembedding = engine.weights.base("lm_head.weight").float().clone()
    products(engine, 0, unembedding)  # the first one is slower
    for layer in track(range(layers), "layers", console=Console(stderr=True)):
        pairs = [(layer, neuron) for neuron in range(engine.sites.neurons)]
        spent["products"].append(products(engine, layer, unembedding))
        for name in ("labels", "fast labels"):
            start = time.perf_counter()
            packed_labels(engine, pairs, cache_dir=folder, fast=name == "fast labels")
            spent[name].append(time.perf_counter() - start)
    exact, fast = (read_atlas(engine, range(layers), cache_dir=folder, fast=each) for each in (False, True))
    return {"layers": layers, "seconds": spent, **agreement(exact, fast)}


def products(engine: TransformersEngine, layer: int, unembedding: torch.Tensor) -> float:
    """Seconds of nothing but the products of a layer's write and read vectors with the unembedding, in blocks."""
    rows = list(range(engine.sites.neurons))
    vectors = [write_directions(engine, layer, rows), *read_directions(engine, layer, rows).values()]
    size = rows_at_once(engine)
    out = torch.empty(size * _BLOCK)
    start = time.perf_counter()
    for each in vectors:
        for piece in torch.split(each.contiguous(), size):
            for block in torch.split(unembedding, _BLOCK):
                torch.mm(piece, block.T, out=out[: len(piece) * len(block)].view(len(piece), len(block)))
    return time.perf_counter() - start


def agreement(exact: Atlas, fast: Atlas) -> dict[str, float]:
    """How many of the fast labels' first tokens, and their probabilities, are as they should be."""
    same = exact.packed["ids"][..., 0] == fast.packed["ids"][..., 0]
    ratio = np.abs(fast.packed["probabilities"][..., 0] / exact.packed["probabilities"][..., 0] - 1)
    return {
        "top_1_agree": float(same.mean()),
        "probability_off_p99": float(np.quantile(ratio[same], 0.99)),
        "entropy_off_p99": float(np.quantile(np.abs(exact.packed["entropy"] - fast.packed["entropy"]), 0.99)),
    }


# --------------------------------------------------------------------------------------------------- the 8B shapes


def large(embedded: TransformersEngine, folder: Path) -> dict[str, Any]:
    """One layer's up projection at 8B shapes, exactly and fast."""
    engine = large_engine(embedded, folder)
    neurons = list(range(engine.sites.neurons))
    directions = read_directions(engine, 0, neurons)["up"]
    print("the exact product", file=sys.stderr)
    start = time.perf_counter()
    exact = decode(engine, directions)
    exact_seconds = time.perf_counter() - start
    start = time.perf_counter()
    coarse = Coarse(engine)
    rounded = time.perf_counter() - start
    print("the fast one", file=sys.stderr)
    start = time.perf_counter()
    fast = decode(engine, directions, coarse)
    fast_seconds = time.perf_counter() - start
    return {
        **LARGE,
        "exact_seconds": exact_seconds,
        "fast_seconds": fast_seconds,
        "rounding_seconds": rounded,
        "exact_minutes_32": LARGE_LAYERS * exact_seconds / 60,
        "fast_minutes_32": (LARGE_LAYERS * fast_seconds + rounded) / 60,
        "top_1_agree": float((exact.ids[:, 0] == fast.ids[:, 0]).float().mean()),
    }


def large_engine(embedded: TransformersEngine, folder: Path) -> TransformersEngine:
    """An engine of one layer with random weights; tokens are the embedded model's as far as those go."""
    config = LlamaConfig(
        **LARGE,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            for rows in torch.split(parameter, 8192):
                rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
    model.tie_weights()
    source = ModelSource("8B shapes", "folder", folder, folder)
    loaded = LoadedModel(model.eval(), embedded.loaded.tokenizer, source, "random-8b")
    return TransformersEngine(loaded, spare_neurons=0)


# ------------------------------------------------------------------------------------------------------- clamping


def clamps(engine: TransformersEngine) -> dict[str, Any]:
    """Factors on the next token's probability under clamps of the surest neurons, and of random ones."""
    with Console(stderr=True).status("labelling every neuron"):
        atlas = read_atlas(engine)
    peaks = largest(engine)
    prompts = [engine.format.encode_text(text, special=True) for text in PROMPTS]
    before = next_logprobs(engine, prompts)
    generator = torch.Generator().manual_seed(0)
    surest = atlas.surest()[:CLAMPED]
    places = torch.randperm(peaks.numel(), generator=generator)[:CLAMPED].tolist()
    random = [divmod(place, peaks.shape[1]) for place in places]
    tokens = torch.randint(engine.sites.vocabulary, (TOKENS,), generator=generator)
    found: dict[str, list[float]] = {"surest": [], "random neurons": [], "random tokens": []}
    for name, neurons in (("surest", surest), ("random neurons", random)):
        for neuron in track(neurons, name, console=Console(stderr=True)):
            held = Active(adjustment(engine, {neuron: float(peaks[neuron])}))
            with engine.preview((*engine.state, held)):
                moved = (next_logprobs(engine, prompts) - before).mean(0)  # (vocabulary,)
            found[name].append(math.exp(moved[atlas.label(*neuron).promotes.top[0].id]))
            if name == "surest":
                found["random tokens"].append(math.exp(moved[tokens].median()))
    return {
        "prompts": len(prompts),
        "factors": found,
        "label_probability": [atlas.label(*neuron).promotes.top[0].probability for neuron in surest],
    }


def largest(engine: TransformersEngine) -> torch.Tensor:
    """Every neuron's largest activation on plain text, (layers, neurons)."""
    ids = engine.format.encode_text(plain_text()[: TEXT * 8])[:TEXT]
    layers = range(engine.sites.layers)
    found = torch.full((len(layers), engine.sites.neurons), -math.inf)
    for piece in torch.split(torch.tensor(ids), 256):
        replay = engine.record([piece.tolist()], [1], neurons=layers, final=False)
        for layer in layers:
            found[layer] = torch.maximum(found[layer], replay.neurons[layer][0].float().amax(0).cpu())
    return found


def next_logprobs(engine: TransformersEngine, prompts: list[list[int]]) -> torch.Tensor:
    """The next token's log-probabilities (n, vocabulary)."""
    with torch.inference_mode():
        replay = engine.record(prompts, [len(prompt) - 1 for prompt in prompts])
        return engine.unembed(replay.final[:, 0]).float().log_softmax(-1).cpu()


# ------------------------------------------------------------------------------------------------------- the table


def table(data: dict[str, Any]) -> str:
    """The run as Markdown."""
    lines = ["| what | to reach | measured | |", "|---|---|---|---|"]

    def line(what: str, target: str, value: str, reached: bool | None = None) -> None:
        lines.append(f"| {what} | {target} | {value} | {'' if reached is None else 'yes' if reached else '**no**'} |")

    if "atlas" in data:
        found = data["atlas"]
        spent = {name: sum(each) for name, each in found["seconds"].items()}
        ratio = spent["labels"] / spent["products"]
        line(f"labels of {found['layers']} layers over the bare products", "≤ 1.3", f"{ratio:.2f}", ratio <= 1.3)
        line("seconds: products, labels, fast labels", "", ", ".join(f"{each:.0f}" for each in spent.values()))
        agree = found["top_1_agree"]
        line("fast labels: same top token", "≥ 99.9 %", f"{agree:.2%}", agree >= 0.999)
        off = f"{found['probability_off_p99']:.1%}, {found['entropy_off_p99']:.4f} nats"
        line("fast labels: 99 % have probability and entropy within", "", off)
    if "large" in data:
        found = data["large"]
        line("8B shapes, one layer's up projection, exact: seconds", "", f"{found['exact_seconds']:.0f}")
        minutes = found["exact_minutes_32"]
        line("8B shapes, 32 layers, exact: minutes", "< 15", f"{minutes:.1f}", minutes < 15)
        line("8B shapes, one layer, fast: seconds", "", f"{found['fast_seconds']:.0f}")
        minutes = found["fast_minutes_32"]
        line("8B shapes, 32 layers, fast: minutes", "< 15", f"{minutes:.1f}", minutes < 15)
        agree = found["top_1_agree"]
        line("8B shapes: fast and exact agree on the top token", "≥ 99.9 %", f"{agree:.3%}", agree >= 0.999)
    if "clamp" in data:
        for name, factors in data["clamp"]["factors"].items():
            gained = sum(factor > 1 for factor in factors)
            line(f"clamped, {name}: gained; median factor", "", f"{gained} of {len(factors)}; {median(factors):.2f}")
    line("peak memory", "≤ 3 GB", f"{data['peak_bytes'] / 1e9:.1f} GB", data["peak_bytes"] <= 3e9)
    lines.append(f"\n{data['model']}, {data['threads']} threads.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
