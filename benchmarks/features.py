"""Steering with a feature against steering with a difference of means, concept by concept, at the same KL.

A concept is a list of twelve words: with four of them the directions are chosen, with four it is checked whether what
was chosen still tells the concept apart, and the last four stand in no sentence at all. Sentences are made by rule from
the same templates for all concepts and for the neutral words. The feature is the one whose mean coefficient over a
sentence separates the concept's sentences from neutral ones best (Cohen's d), once among features of plain English and
once among features of the very sentences; the difference of means is that of the residual stream behind the same layer
on the same sentences, and also that of the layer's neurons, written through down. Each direction is calibrated to the
same mean KL on neutral contexts. Measured, in other neutral contexts: how much the log-probability of the concept's
last four words rises (each word's first token, where the word is one token).

    python benchmarks/features.py --json features.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from liveweight import LiveModel
from liveweight.engines.base import ScoreItem
from liveweight.engines.fingerprints import write_atomically
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound
from liveweight.methods.calibration import Rows
from liveweight.methods.direction import directed
from liveweight.tracing import Features, residual_directions
from liveweight.tracing.factorisation import encode
from liveweight.tracing.passages import Passage, passages, read_neurons, spread
from liveweight.tracing.super_weights import _packaged

CONCEPTS = {
    "colours": "red blue green yellow purple orange brown pink white black grey silver",
    "animals": "dog cat horse cow sheep tiger lion wolf bear rabbit elephant monkey",
    "cities": "Paris London Berlin Rome Madrid Vienna Tokyo Moscow Chicago Boston Sydney Delhi",
    "food": "bread cheese rice soup pasta salad pizza cake meat fish butter sugar",
    "music": "song guitar piano violin drums melody orchestra concert jazz album singer opera",
    "months": "January February March April June July August September October November December May",
    "body": "arm leg head hand foot nose ear knee shoulder finger heart brain",
    "family": "mother father sister brother uncle aunt cousin grandmother daughter son wife husband",
    "weather": "rain snow wind storm thunder fog cloud sunshine ice heat humidity drought",
    "sports": "football tennis basketball baseball hockey golf swimming cricket soccer rugby boxing cycling",
    "money": "dollar bank loan price salary tax debt profit wage interest cash investment",
    "school": "teacher student classroom homework lesson exam pupil textbook grade university college curriculum",
    "medicine": "doctor hospital nurse surgery patient medicine vaccine disease cancer infection therapy diagnosis",
    "war": "soldier army battle weapon tank bomb general enemy war troops military navy",
    "computers": "computer software keyboard internet program website database server code algorithm data hardware",
    "religion": "church God prayer priest Bible temple faith heaven soul prophet Jesus worship",
    "law": "court judge lawyer crime prison jury police trial law justice murder criminal",
    "space": "planet star moon rocket galaxy comet orbit astronaut telescope sun Mars universe",
    "plants": "tree flower grass leaf root rose oak bush seed forest garden plant",
    "clothes": "shirt trousers coat hat shoe dress jacket sock scarf skirt glove clothing",
    "numbers": "one two three four five six seven eight nine ten hundred thousand",
    "emotions": "anger joy fear sadness love hate grief pride happiness anxiety shame guilt",
    "vehicles": "car truck bus train bicycle motorcycle boat airplane ship vehicle taxi tractor",
    "countries": "France Germany Italy Spain Poland Greece Japan India China Canada Mexico Brazil",
}
NEUTRAL = "thing idea plan matter answer reason point part way case fact side"
TEMPLATES = (
    "They spoke about the {} for a long while.",
    "In the end it was the {} that she remembered.",
    "Nobody there had expected the {}, and so they waited.",
    "He wrote a few lines on the {} and went home.",
)
EACH = 4  # words of a part: to choose by, to check by, never seen
CONTEXTS, BEFORE, AFTER = 24, 12, 6  # neutral contexts of a kind, their tokens, and those where words are due
ARMS = ("means", "neurons", "feature", "own feature")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=None, help="which; else the one of liveweight features")
    parser.add_argument("--k", type=int, default=100, help="features of each of the two sets")
    parser.add_argument("--kl", type=float, default=0.3, help="mean KL on neutral contexts, in nats")
    parser.add_argument("--text", type=Path, default=None, help="plain English to factorise instead of what ships")
    parser.add_argument(
        "--against", choices=("neutral", "others"), default="neutral", help="what a concept is told from"
    )
    parser.add_argument("--concepts", default=",".join(CONCEPTS), help="which, by name")
    parser.add_argument("--json", type=Path, default=Path("features.json"), help="where the figures are written")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    console = Console(stderr=True)
    with TemporaryDirectory() as folder, LiveModel.load(given.model, workspace=folder, threads=given.threads) as live:
        engine = live.engine
        chosen_by = [sentence for words in CONCEPTS.values() for sentence in sentences(words, 0)]
        chosen_by += sentences(NEUTRAL, 0)
        text = given.text.read_text(encoding="utf-8") if given.text else None
        console.print("factorising")
        plain = live.features(layer=given.layer, k=given.k, text=text)
        layer = plain.settings.layer
        own = live.features(layer=layer, k=given.k, text="\n".join(chosen_by), text_name="sentences")
        calibrating, measuring = contexts(engine)
        there = Rows(engine, measuring, [layer])
        report: dict[str, Any] = {
            "model": given.model,
            "layer": layer,
            "k": given.k,
            "kl": given.kl,
            "against": given.against,
            "errors": {"plain": plain.error, "own": own.error},
            "tokens": {"plain": plain.tokens, "own": own.tokens},
            "rows": [],
        }
        print("| concept | " + " | ".join(ARMS) + " | feature, d | own feature, d |")
        print("|---|" + "---|" * (len(ARMS) + 2))
        for name in given.concepts.split(","):
            about = [read(engine, layer, sentences(CONCEPTS[name], part)) for part in (0, 1)]
            none = [read(engine, layer, opposite(name, given.against, part)) for part in (0, 1)]
            words = unseen(engine, CONCEPTS[name])
            found = directions(engine, layer, about[0], none[0], {"feature": plain, "own feature": own})
            row: dict[str, Any] = {"concept": name, "words": len(words)}
            for arm, (vector, number) in found.items():
                row[arm] = rise(engine, layer, vector, calibrating, there, words, given.kl)
                if number is not None:
                    features = plain if arm == "feature" else own
                    told = features[number]
                    row[f"{arm}, chosen"] = {"number": number, "writes": told.promotes.text(6)}
                    for part, on in enumerate(("chosen by", "checked")):
                        d = separation(features, about[part]["neurons"], none[part]["neurons"])
                        row[f"{arm}, d {on}"] = float(d[number])
            report["rows"].append(row)
            write_atomically(given.json, json.dumps(report, indent=1))
            values = " | ".join("" if row[arm] is None else f"{row[arm]:+.3f}" for arm in ARMS)
            print(f"| {name} | {values} | {row['feature, d checked']:.2f} | {row['own feature, d checked']:.2f} |")
        summary(report["rows"])


def sentences(words: str, part: int) -> list[str]:
    """Every template with each of a part's words."""
    return [template.format(word) for word in words.split()[EACH * part : EACH * (part + 1)] for template in TEMPLATES]


def opposite(concept: str, against: str, part: int) -> list[str]:
    """Sentences that are not about a concept: with neutral words, or one about each of the other concepts."""
    if against == "neutral":
        return sentences(NEUTRAL, part)
    others = [words for name, words in CONCEPTS.items() if name != concept]
    return [sentences(words, part)[number % EACH**2] for number, words in enumerate(others)]


def unseen(engine: TransformersEngine, words: str) -> list[int]:
    """The tokens of a concept's last words, of those that are one token after a space."""
    found = [engine.format.encode_text(f" {word}") for word in words.split()[2 * EACH :]]
    return [ids[0] for ids in found if len(ids) == 1]


def contexts(engine: TransformersEngine) -> tuple[list[ScoreItem], list[ScoreItem]]:
    """Neutral contexts to calibrate on and others to measure in, from the plain English that ships."""
    cut = [
        ScoreItem(each.ids[:BEFORE], each.ids[BEFORE : BEFORE + AFTER])
        for each in passages(engine, _packaged("methods", "plain_text.txt"), 10**6)
        if len(each.ids) >= BEFORE + AFTER
    ]
    found = [cut[place] for place in spread(len(cut), 2 * CONTEXTS)]
    return found[::2], found[1::2]


def read(engine: TransformersEngine, layer: int, texts: Sequence[str]) -> dict[str, Any]:
    """The layer's neurons a sentence, [(neurons, tokens)], and the mean stream behind it, (sentences, width)."""
    rows: list[Passage] = [passages(engine, text, 64)[0] for text in texts]
    values = torch.split(read_neurons(engine, layer, rows), [row.read for row in rows], dim=1)
    streams = Rows(engine, [ScoreItem(row.ids[:-1], row.ids[-1:]) for row in rows], [layer]).streams[layer]
    return {
        "neurons": values,
        "stream": torch.stack(
            [each[row.start :].float().mean(0).cpu() for each, row in zip(streams, rows, strict=True)]
        ),
    }


def separation(features: Features, about: Sequence[Tensor], none: Sequence[Tensor]) -> Tensor:
    """Cohen's d of every feature's mean coefficient a sentence, about the concept against neutral ones: (k,)."""
    sides = []
    for values in (about, none):
        coefficients = encode(features.directions, torch.cat(list(values), dim=1))
        sides.append(torch.stack([p.mean(1) for p in torch.split(coefficients, [v.shape[1] for v in values], dim=1)]))
    pooled = ((sides[0].var(0) + sides[1].var(0)) / 2).sqrt().clamp_min(1e-6)
    return (sides[0].mean(0) - sides[1].mean(0)) / pooled


def directions(
    engine: TransformersEngine, layer: int, about: dict[str, Any], none: dict[str, Any], sets: dict[str, Features]
) -> dict[str, tuple[Tensor, int | None]]:
    """Each arm's direction of the residual stream (width,), and the number of the feature that it is."""
    means = [torch.stack([values.mean(1) for values in side["neurons"]]).mean(0) for side in (about, none)]
    neurons = residual_directions(engine, layer, (means[0] - means[1])[:, None])[0]
    found: dict[str, tuple[Tensor, int | None]] = {
        "means": (about["stream"].mean(0) - none["stream"].mean(0), None),
        "neurons": (neurons, None),
    }
    for arm, features in sets.items():
        number = int(separation(features, about["neurons"], none["neurons"]).argmax())
        found[arm] = (features.written[number], number)
    return found


def rise(
    engine: TransformersEngine,
    layer: int,
    vector: Tensor,
    calibrating: Sequence[ScoreItem],
    there: Rows,
    words: Sequence[int],
    kl: float,
) -> float | None:
    """Nats by which the words' log-probability rises, mean over words and places; None where no strength has the KL."""
    try:
        found = directed(engine, "direction", layer, vector, calibrating, target=kl, measure="mean")
    except NoMendFound:
        return None
    with torch.no_grad():
        tokens = torch.tensor(list(words))
        said = [
            engine.unembed(torch.cat(finals)).float().log_softmax(-1)[:, tokens].mean()
            for finals in (there.finals, there.run(layer, found.factor * found.vector))
        ]
    return float(said[1] - said[0])


def summary(rows: Sequence[dict[str, Any]]) -> None:
    """Means, and how many concepts each arm wins against the difference of means."""
    print()
    print("| direction | mean rise (nats) | median | concepts that it moves further than the means | reached the KL |")
    print("|---|---|---|---|---|")
    for arm in ARMS:
        both = [(row[arm], row["means"]) for row in rows if row[arm] is not None and row["means"] is not None]
        values = torch.tensor([value for value, _ in both])
        wins = sum(value > means for value, means in both)
        told = "" if arm == "means" else f"{wins} of {len(both)}"
        print(f"| {arm} | {float(values.mean()):+.3f} | {float(values.median()):+.3f} | {told} | {len(both)} |")


if __name__ == "__main__":
    main()
