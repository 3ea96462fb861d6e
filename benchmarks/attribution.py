"""How well cheap attributions tell what true activation patching would: their correlation, by kind of part.

Pairs of prompts are made from public relations: one template, two subjects of as many tokens each, two answers. The
clean prompt must be answered rightly, its answer's first token above the other one's. What is attributed is that
margin at the last token; each part takes its value from the corrupted run. Positions that stand before the first
difference are left out, since every measure is exactly zero there and would agree for nothing.

    python benchmarks/attribution.py --data FOLDER --threads 1 --json attribution.json

With --zero there is no corrupted run: the other value of each part is zero, at the same positions.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from liveweight.engines.fingerprints import write_atomically
from liveweight.engines.transformers import TransformersEngine, load_engine
from liveweight.tracing.part_pushes import Comparison, comparison, part_pushes, patched_pushes
from liveweight.tracing.parts import KINDS, PartKind
from liveweight.tracing.patching import Part
from liveweight.tracing.relevance import RELEVANCE, Rule

MEASURES: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "gradient": ("gradient", ()),
    "direct": ("direct", ()),
    "relp": ("relp", RELEVANCE),
    **{f"relp without {rule}": ("relp", tuple(each for each in RELEVANCE if each != rule)) for rule in RELEVANCE},
}
A_RELATION = 4  # pairs
SPAN = 6  # tokens from the first difference on, at most: each is patched at every layer
NEURONS = 32  # of a pair that are patched: so many strongest by gradient, so many by relp, so many at random


@dataclass(frozen=True)
class Pair:
    """Two prompts that differ in their subject."""

    relation: str
    clean: str
    corrupted: str
    answers: tuple[str, str]
    asked: Comparison

    @property
    def differing(self) -> int:
        """At how many positions the prompts differ."""
        assert self.asked.corrupted is not None
        return sum(a != b for a, b in zip(self.asked.tokens, self.asked.corrupted, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with relations/")
    parser.add_argument("--json", type=Path, default=Path("attribution.json"), help="where the figures are written")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=None, help="so many pairs at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zero", action="store_true", help="zero ablation instead of a corrupted run")
    parser.add_argument("--values", type=Path, default=None, help="also write every part's values, for torch.load")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    console = Console(stderr=True)
    engine = load_engine(given.model, threads=given.threads)
    begun = time.perf_counter()
    with Progress(console=console) as bar:
        pairs = list(islice(pairs_of(engine, given.data / "relations", random.Random(given.seed)), given.pairs))
        console.print(f"{len(pairs)} pairs of {len({pair.relation for pair in pairs})} relations")
        generator = torch.Generator().manual_seed(given.seed)
        measured = [measure(engine, pair, generator, given.zero) for pair in bar.track(pairs)]
    seconds = time.perf_counter() - begun
    single = [each for each, pair in zip(measured, pairs, strict=True) if pair.differing == 1]
    groups = {"all": measured, "one token differs": single}
    found = {name: figures(chosen) for name, chosen in groups.items() if chosen}
    if given.values is not None:
        torch.save(measured, given.values)
    told = [{"relation": each.relation, "clean": each.clean, "corrupted": each.corrupted} for each in pairs]
    for row, kinds in zip(told, measured, strict=True):
        row["correlations"] = {
            kind: {name: correlation(values, kinds[kind]["patching"]) for name, values in kinds[kind].items()}
            for kind in KINDS
        }
    wrote = {"model": given.model, "zero": given.zero, "seconds": seconds, "figures": found, "pairs": told}
    write_atomically(given.json, json.dumps(wrote, indent=1))
    for group, kinds in found.items():
        print(f"\n| {group}: {len(groups[group])} pairs | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
        for name in MEASURES:
            cells = [f"{kinds[kind][name]['pooled']:.3f} ({kinds[kind][name]['mean']:.3f})" for kind in KINDS]
            print(f"| {name} | {' | '.join(cells)} |")
    console.print(f"{seconds:.0f} s")


def pairs_of(engine: TransformersEngine, folder: Path, chance: random.Random) -> Iterator[Pair]:
    """At most A_RELATION pairs of each file, no subject twice."""
    for file in sorted(folder.glob("*.json")):
        relation = json.loads(file.read_text(encoding="utf-8"))
        templates = relation["prompt_templates"] + relation.get("prompt_templates_zs", [])
        # The first token of a text is where attention rests, whatever it is: a subject has to stand behind it. Little
        # behind the subject makes few positions.
        templates = [text for text in templates if not text.startswith("{}")]
        if not templates:
            continue
        template = min(templates, key=lambda text: len(text.split("{}")[1]))
        samples: list[dict[str, str]] = relation["samples"]
        chance.shuffle(samples)
        used: set[int] = set()
        made = 0
        for first, second in ((a, b) for a in range(len(samples)) for b in range(len(samples)) if a != b):
            if made == A_RELATION or first > 60:
                break
            if {first, second} & used:
                continue
            pair = _pair(engine, file.stem, template, samples[first], samples[second])
            if pair is not None:
                used |= {first, second}
                made += 1
                yield pair


def _pair(
    engine: TransformersEngine, relation: str, template: str, clean: Mapping[str, str], corrupted: Mapping[str, str]
) -> Pair | None:
    """A pair of two samples; None where it is none."""
    texts = [template.replace("{}", each["subject"]) for each in (clean, corrupted)]
    prompts = [engine.format.encode_text(text, special=True) for text in texts]
    answers = [engine.format.encode_text(" " + each["object"])[:1] for each in (clean, corrupted)]
    if len(prompts[0]) != len(prompts[1]) or prompts[0] == prompts[1] or answers[0] == answers[1]:
        return None
    asked = comparison(engine, prompts[0], answers[0], answers[1], prompts[1])
    if len(asked.tokens) - asked.start > SPAN:
        return None
    final = engine.record([prompts[0]], [len(prompts[0]) - 1]).final[:, -1]
    with torch.inference_mode():
        right, wrong = engine.unembed_tokens(final, torch.tensor([[answers[0][0], answers[1][0]]]))[0].tolist()
    if right <= wrong:
        return None
    return Pair(relation, texts[0], texts[1], (clean["object"], corrupted["object"]), asked)


def measure(
    engine: TransformersEngine, pair: Pair, generator: torch.Generator, zero: bool
) -> dict[PartKind, dict[str, Tensor]]:
    """Every measure of one pair by kind, each (parts,) in one order."""
    start = pair.asked.start
    asked = replace(pair.asked, corrupted=None) if zero else pair.asked
    estimates = {name: part_pushes(engine, asked, KINDS, by, chosen=rules) for name, (by, rules) in MEASURES.items()}
    found: dict[PartKind, dict[str, Tensor]] = {}
    for kind in KINDS:
        values = {name: estimate[kind][:, start:] for name, estimate in estimates.items()}
        if kind == "neurons":
            parts = _sample(values, start, generator)
        else:
            parts = [Part(*_shifted(index, start)) for index in torch.ones_like(values["relp"]).nonzero().tolist()]
        patched = patched_pushes(engine, asked, kind, parts)
        index = tuple(torch.tensor(parts).T)
        found[kind] = {name: estimate[kind][index] for name, estimate in estimates.items()}
        found[kind]["patching"] = patched[index]
    return found


def _sample(values: Mapping[str, Tensor], start: int, generator: torch.Generator) -> list[Part]:
    shape = values["relp"].shape
    strongest = [values[name].abs().flatten().topk(NEURONS).indices for name in ("gradient", "relp")]
    drawn = torch.randint(values["relp"].numel(), (NEURONS,), generator=generator)
    chosen = torch.unique(torch.cat((*strongest, drawn)))
    places = torch.stack(torch.unravel_index(chosen, shape), dim=1).tolist()
    return [Part(*_shifted(index, start)) for index in places]


def _shifted(index: list[int], start: int) -> tuple[int, int, int]:
    return index[0], index[1] + start, index[2]


def figures(measured: list[dict[PartKind, dict[str, Tensor]]]) -> dict[str, Any]:
    """By kind and measure: Pearson's correlation with patching over all parts of all pairs, and the mean over pairs."""
    return {
        kind: {
            name: {
                "pooled": correlation(
                    torch.cat([each[kind][name] for each in measured]),
                    torch.cat([each[kind]["patching"] for each in measured]),
                ),
                "mean": mean(correlation(each[kind][name], each[kind]["patching"]) for each in measured),
            }
            for name in MEASURES
        }
        for kind in KINDS
    }


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, of two (n,)."""
    return float(torch.corrcoef(torch.stack((one, other)).double())[0, 1])


if __name__ == "__main__":
    main()
