"""Milliseconds a token: ours against transformers' own generate on the same prompt, and with tracing on.

    python benchmarks/decode.py --rounds 7

The three ways take turns within one run, so that what else the machine does falls on all of them. Time is counted
from the first new token to the last, so that reading the prompt is left out; the median over the rounds is reported.
Decoding is greedy, and the ways must give the same tokens, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers.generation.streamers import BaseStreamer

from liveweight.engines.base import Message, Sampling
from liveweight.engines.transformers import TransformersEngine, load_engine
from liveweight.errors import LiveweightError, Unsupported

PROMPT = "Tell me a long story about a boat on a river, from its first day on the water to its last."


class Stamps(BaseStreamer):
    """Notes when transformers' generate hands over each token; the first thing it hands over is the prompt."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, or one new token."""
        if self._prompt:
            self._prompt = False
            return
        self.ids.append(int(value))
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be written."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the model: smollm2, a hub id, a folder or a .gguf file")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="the weights' type")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; unset leaves it to torch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, after one that is thrown away")
    parser.add_argument("--json", type=Path, default=None, help="where every round is written")
    options = parser.parse_args()
    try:
        engine = load_engine(options.model, dtype=options.dtype, threads=options.threads)
        return measure(engine, options)
    except LiveweightError as error:
        print(f"{error.message} {error.hint}", file=sys.stderr)
        return error.exit_code


def measure(engine: TransformersEngine, options: argparse.Namespace) -> int:
    prompt = engine.encode([Message("user", PROMPT)])
    watched = [f"layers.{layer}.mlp.neurons" for layer in range(engine.info.layers)]
    ways = {
        "transformers": lambda: theirs(engine, prompt, options.tokens),
        "liveweight": lambda: ours(engine, prompt, options.tokens, []),
        "liveweight, tracing": lambda: ours(engine, prompt, options.tokens, watched),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        said = {}
        for name, way in ways.items():
            said[name], milliseconds = way()
            if number:
                spent[name].append(milliseconds)
        if len({tuple(ids) for ids in said.values()}) > 1:
            raise Unsupported("The ways gave different tokens, so their times are not comparable.", hint="Use float32.")
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    report(engine, spent, len(said["transformers"]), options.json)
    return 0


def theirs(engine: TransformersEngine, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """What transformers' own generate gives: ids, and milliseconds a token."""
    stamps = Stamps()
    ids = torch.tensor([prompt], device=engine.sites.embed.weight.device)
    with torch.inference_mode():
        engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=engine.format.pad_token,
            streamer=stamps,
        )
    return stamps.ids, each(stamps.times)


def ours(engine: TransformersEngine, prompt: list[int], tokens: int, watch: list[str]) -> tuple[list[int], float]:
    """The engine's stream, text and log-probability of each token included: ids, and milliseconds a token."""
    ids, times = [], []
    for token in engine.continue_from(prompt, Sampling(max_tokens=tokens), watch=watch):
        ids.append(token.id)
        times.append(time.perf_counter())
    return ids, each(times)


def each(times: list[float]) -> float:
    return 1000 * (times[-1] - times[0]) / (len(times) - 1)


def report(engine: TransformersEngine, spent: dict[str, list[float]], tokens: int, file: Path | None) -> None:
    medians = {name: median(found) for name, found in spent.items()}
    fast = medians["liveweight"] / medians["transformers"]
    traced = medians["liveweight, tracing"] / medians["liveweight"]
    print("| what | to reach | measured | |\n|---|---|---|---|")
    for name, value in medians.items():
        low, high = min(spent[name]), max(spent[name])
        print(f"| {name}: ms a token, median of {len(spent[name])} | | {value:.1f} ({low:.1f} to {high:.1f}) | |")
    print(f"| time per token, ours over transformers' | ≤ 0.8 | {fast:.3f} | {'yes' if fast <= 0.8 else '**no**'} |")
    print(f"| time per token, tracing on over off | ≤ 1.05 | {traced:.3f} | {'yes' if traced <= 1.05 else '**no**'} |")
    info = engine.info
    print(f"\n{info.name}, {info.dtype}, {info.device}, {torch.get_num_threads()} threads, {tokens} tokens.")
    if file is not None:
        file.write_text(json.dumps({"ms": spent, "ours": fast, "tracing": traced}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
