"""Steering on Anthropic's persona sets and on two words: what moves, and at what KL, where nothing was fitted.

A set's first 250 questions are what a steering is made from (two thirds for the direction, one third to choose the
layer); the others are held out. Measured there: the mean probability of the matching answer among " Yes" and " No",
in the chat template, without and with the steering, and the KL on neutral instructions that the calibration never saw.

    python benchmarks/steer.py --data FOLDER --json steer.json

Every steering is saved beside the JSON file, in a folder of its name.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from liveweight import LiveModel
from liveweight.adjustments import Active, Adjustment, State
from liveweight.engines.base import Message
from liveweight.engines.fingerprints import write_atomically
from liveweight.methods.calibration import kl_between, summed_up
from liveweight.methods.sides import Pair, read_pairs
from liveweight.methods.steer import Steering

SETS = ("agreeableness", "extraversion", "interest-in-science", "optionality-preservation")
WORDS, WORDS_KL, WORDS_PROMPT = "Love - Hate", 0.5, "Tell me about my neighbour."
MADE_FROM = 250  # questions of a set; the others are held out
TARGET = 0.22  # nats of mean KL. At 0.28, instructions that the calibration never saw had 0.37: they stay below 0.3 too
HARMLESS = 200  # neutral instructions that the calibration never saw
TOKENS = 8  # of the base's own answers to them
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with persona/ and refusal/")
    parser.add_argument("--json", type=Path, default=Path("steer.json"), help="where the figures are written")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sets", default=",".join(SETS), help="which sets, by name; none for the two words alone")
    parser.add_argument("--how", default="mean,tuned", help="which ways of finding a direction")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    console = Console(stderr=True)
    found: dict[str, Any] = {"target": TARGET, "model": given.model, "rows": []}
    print(
        "| set | how | layer | matching before | after | points | mean KL | p95 KL | unseen KL | unseen p95 | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with (
        TemporaryDirectory() as folder,
        LiveModel.load(
            given.model, workspace=Path(folder), threads=given.threads, progress=console.is_terminal
        ) as live,
    ):
        unseen = _harmless(given.data)
        sets = {name: read_pairs(given.data / "persona" / f"{name}.jsonl") for name in given.sets.split(",") if name}
        before = {name: matching(live, pairs[MADE_FROM:], ()) for name, pairs in sets.items()}
        for how in given.how.split(","):
            for name, pairs in sets.items():
                console.print(f"{name}: {how}")
                begun = time.perf_counter()
                steering = live.steer(pairs=pairs[:MADE_FROM], how=how, kl=TARGET, measure="mean", name=name)
                seconds = time.perf_counter() - begun
                steering.adjustment().save(given.json.with_suffix("") / f"{name}-{how}")
                row = _row(live, steering, pairs[MADE_FROM:], before[name], unseen) | {"seconds": seconds}
                found["rows"].append(row)
                write_atomically(given.json, json.dumps(found, indent=1))
                print(
                    f"| {name} | {how} | {row['layer']} | {row['before']:.1%} | {row['after']:.1%} "
                    f"| {row['points']:+.1f} | {row['mean_kl']:.3f} | {row['p95_kl']:.3f} "
                    f"| {row['unseen_mean_kl']:.3f} | {row['unseen_p95_kl']:.3f} | {seconds:.0f} |",
                    flush=True,
                )
        found["words"] = _words(live)
        write_atomically(given.json, json.dumps(found, indent=1))


def matching(live: LiveModel, pairs: Sequence[Pair], state: State) -> float:
    """Mean probability of the matching answer's first token among those of the two answers, in the chat template."""
    engine = live.engine
    shares = []
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        prompts = [engine.encode([toward[0]]) for toward, _ in batch]  # type: ignore[list-item]
        both = torch.tensor(
            [
                [engine.format.encode_continuation(prompt, side[1].content)[0] for side in pair]  # type: ignore[union-attr]
                for prompt, pair in zip(prompts, batch, strict=True)
            ]
        )
        with engine.preview((*engine.state, *state)), torch.inference_mode():
            final = engine.record(prompts, [len(prompt) - 1 for prompt in prompts]).final[:, 0]
            shares.append(engine.unembed_tokens(final, both.to(final.device)).float().softmax(-1)[:, 0].cpu())
    return float(torch.cat(shares).mean())


def kl_on(live: LiveModel, questions: Sequence[str], adjustment: Adjustment) -> tuple[float, float]:
    """Mean and 95th percentile over questions of the KL on the base's own first tokens of an answer."""
    engine, found = live.engine, []
    for start in range(0, len(questions), BATCH):
        prompts = [engine.encode([Message("user", question)]) for question in questions[start : start + BATCH]]
        answers = engine.greedy(prompts, TOKENS)
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        starts, finals = [len(prompt) - 1 for prompt in prompts], []
        for state in ((), (Active(adjustment),)):
            with engine.preview((*engine.state, *state)), torch.inference_mode():
                finals.append(engine.record(rows, starts).final)
        with torch.inference_mode():
            for place, answer in enumerate(answers):
                said = slice(0, len(answer))
                found.append(kl_between(engine, finals[0][place, said], finals[1][place, said]).mean())
    return summed_up(torch.stack(found))


def _row(
    live: LiveModel, steering: Steering, held: Sequence[Pair], before: float, unseen: Sequence[str]
) -> dict[str, Any]:
    adjustment = steering.adjustment()
    after = matching(live, held, (Active(adjustment),))
    mean, p95 = kl_on(live, unseen, adjustment)
    measured = {"before": before, "after": after, "points": 100 * (after - before), "held_out": len(held)}
    return steering.as_dict() | measured | {"unseen_mean_kl": mean, "unseen_p95_kl": p95, "unseen": len(unseen)}


def _words(live: LiveModel) -> dict[str, Any]:
    """Two words with their curve."""
    steering = live.steer(WORDS, kl=WORDS_KL)
    without, steered = live.tried(steering.adjustment(), WORDS_PROMPT)
    print(f"\n{WORDS}: layer {steering.layer}, p95 KL {steering.p95_kl:.3f} of {WORDS_KL}\n")
    print("| factor | mean KL | p95 KL | effect (nats) |\n|---|---|---|---|")
    for point in steering.curve:
        print(f"| {point.factor:.3f} | {point.mean_kl:.4f} | {point.p95_kl:.4f} | {point.effect:+.3f} |")
    print(f"\n{WORDS_PROMPT}\n\n| without | with |\n|---|---|")
    print(f"| {' '.join(without.split())} | {' '.join(steered.split())} |")
    return steering.as_dict() | {"prompt": WORDS_PROMPT, "without": without, "with": steered}


def _harmless(data: Path) -> list[str]:
    items = json.loads((data / "refusal" / "harmless_first1000.json").read_text(encoding="utf-8"))
    return [item["instruction"] for item in items[:HARMLESS]]


if __name__ == "__main__":
    main()
