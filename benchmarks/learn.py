"""A batch of facts by `learn`, against the same facts fixed one at a time.

    python benchmarks/learn.py --data ../shared/data --json learn.json

The facts are the first questions about countries that the model gets wrong. The batch is one call of `live.learn`,
guard and commit included; success is judged by free generation through the chat template afterwards, in the question as
asked and in wordings that no method sees. Single fixes are made with `auto`, each on the base model and undone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median

from liveweight import LiveModel
from liveweight.errors import GuardRefused, LiveweightError, NoMendFound, StateConflict
from liveweight.evaluation import Kept, KLMeter, NeighbourMeter, PerplexityMeter, answer_batch, instructions, says
from liveweight.evaluation.sources import plain_text
from liveweight.settings import Settings
from records import base_answers

TOKENS = 32  # of a reply that is judged by its first sentence


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of countries.json and others")
    parser.add_argument("--model", default="smollm2", help="the model: smollm2, a hub id, a folder or a .gguf file")
    parser.add_argument("--facts", type=int, default=100, help="facts of the batch")
    parser.add_argument("--first", type=int, default=0, help="how many of the facts to skip")
    parser.add_argument("--threads", type=int, default=None, help="processor threads")
    parser.add_argument("--singles", type=int, default=100, help="how many of them are fixed alone, to compare")
    parser.add_argument("--method", default=None, help="the method of the joint change")
    parser.add_argument("--force", action="store_true", help="commit over the guard's budget")
    parser.add_argument("--json", type=Path, default=Path("learn.json"), help="where the figures are written")
    options = parser.parse_args()
    try:
        return run(options)
    except LiveweightError as error:
        print(f"{error.message} {error.hint}", file=sys.stderr)
        return error.exit_code


def run(options: argparse.Namespace) -> int:
    with model(options) as live:
        wrong, right = base_answers(live, options.data, options.first + options.facts, 100, TOKENS)
        wrong = wrong[options.first :]
        neighbours = NeighbourMeter(live.engine, [Kept(e.question, e.reply, e.answers) for e in right], TOKENS)
        kl = KLMeter(live.engine, instructions(options.data)[:100])
        perplexity = PerplexityMeter(live.engine, plain_text(options.data))
        base = live.fingerprints()
        records = [{"prompt": each.question, "correction": each.wanted} for each in wrong]
        begun = time.perf_counter()
        learnt = live.learn(records, method=options.method, force=options.force, progress=say)
        batch = time.perf_counter() - begun
        texts = answer_batch(live.engine, [each.question for each in wrong], TOKENS)
        held = answer_batch(live.engine, [text for each in wrong for text in each.held_out], TOKENS)
        wanted = [each.wanted for each in wrong for _ in each.held_out]
        kept = neighbours.measure()
        found = {
            "facts": len(wrong),
            "batch_seconds": batch,
            "by_phase": learnt.seconds,
            "changes": len(learnt.changes),
            "outcomes": {item.outcome: learnt.count(item.outcome) for item in learnt.items},
            "right": mean(says(text, each.wanted) for text, each in zip(texts, wrong, strict=True)),
            "held_out": mean(says(text, answer) for text, answer in zip(held, wanted, strict=True)),
            "neighbours_unchanged": kept.unchanged / kept.count,
            "neighbours_right": kept.right / kept.count,
            "kl": mean(kl.measure()),
            "perplexity_ratio": perplexity.ratio(),
            "unlearnt": [item.model_dump() for item in learnt.items if item.outcome != "learnt"],
        }
        while any(change.state in ("active", "off") for change in live.changes()):
            live.undo()
        found["undo_exact"] = live.fingerprints() == base
    options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    with model(options) as live:
        spent = []
        for number, each in enumerate(wrong[: options.singles]):
            say("single fixes", number, options.singles)
            begun = time.perf_counter()
            try:
                change = live.fix(live.chat(each.question, max_tokens=TOKENS), each.wanted)
            except (GuardRefused, NoMendFound, StateConflict):
                change = None
            spent.append(time.perf_counter() - begun)
            if change is not None:
                live.undo(change)
    found["single_seconds"], found["single_median"] = sum(spent), median(spent) if spent else None
    found["ratio"] = batch / (sum(spent) / len(spent) * len(wrong)) if spent else None
    options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("| what | to reach | measured |\n|---|---|---|")
    print(f"| {len(wrong)} facts by `learn`: right as asked | ≥ 95 % | {found['right']:.1%} |")
    print(f"| held-out wordings | | {found['held_out']:.1%} |")
    print(
        f"| neighbours unchanged; KL; perplexity ratio | | {found['neighbours_unchanged']:.1%}; {found['kl']:.4f}; "
        f"{found['perplexity_ratio']:.4f} |"
    )
    print(
        f"| seconds, in {found['changes']} changes; undo | | {batch:.0f}; "
        f"{'exact' if found['undo_exact'] else 'not exact'} |"
    )
    if spent:
        print(f"| against single fixes ({len(spent)}, {mean(spent):.1f} s each) | ≤ 1/8 | {found['ratio']:.3f} |")
    return 0


@contextmanager
def model(options: argparse.Namespace) -> Iterator[LiveModel]:
    """The model in its base state with a workspace that is thrown away."""
    with tempfile.TemporaryDirectory(prefix="liveweight-benchmark-") as folder:
        settings = Settings(model=options.model, workspace=Path(folder), threads=options.threads)
        with LiveModel.load(settings=settings) as live:
            yield live


def say(what: str, done: int, of: int) -> None:
    print(f"\r{what}: {done} of {of}    ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
