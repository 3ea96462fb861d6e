"""Round-to-nearest quantisation over bits and block sizes, with the super weights held out and without.

    python benchmarks/quantize.py --data FOLDER --json quantize.json

Perplexity on the first tokens of WikiText-2's test text, in windows of 256, of the model as it is and with every
linear weight of the blocks rounded (embeddings and head are left). Each way is measured with and without clipping at a
z-score, and then with activations rounded, too. After the last one, every tensor's bytes are compared with those before
the first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from liveweight import LiveModel
from liveweight.adjustments import Active
from liveweight.engines.fingerprints import write_atomically
from liveweight.tracing import find_super_weights
from liveweight.tracing.plain_text import counted, perplexity, text_of, windows_of
from liveweight.tracing.quantization import Scheme, block_of, quantized

BITS = (8, 4, 3)
BLOCKS = ("1x64", "64", "256", "100000")  # the last one is a whole matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with wikitext/")
    parser.add_argument("--json", type=Path, default=Path("quantize.json"), help="where the figures are written")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text")
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--blocks", default=",".join(BLOCKS))
    parser.add_argument("--clips", default="none,5", help="none, or z-scores")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    console = Console(stderr=True)
    clips = [None if each == "none" else float(each) for each in given.clips.split(",")]
    with (
        TemporaryDirectory() as folder,
        LiveModel.load(given.model, workspace=Path(folder), threads=given.threads) as live,
    ):
        engine = live.engine
        before = engine.fingerprints()
        windows = windows_of(
            engine, text_of(given.data / "wikitext" / "wikitext2_raw_test_first_half.txt"), tokens=given.tokens
        )
        held = find_super_weights(engine, live.settings.cache_dir)
        base = perplexity(engine, windows)
        found: dict[str, Any] = {
            "model": given.model,
            "tokens": counted(windows),
            "perplexity": base,
            "super_weights": [f"{each.site} [{each.row}, {each.column}]" for each in held.confirmed],
            "rows": [],
        }
        console.print(f"{base:.3f} as it is, on {counted(windows)} tokens; super weights {found['super_weights']}")
        print("| bits | block | clip | activations | super weights rounded | held out | activations held out, too |")
        print("|---|---|---|---|---|---|---|")
        schemes = [
            Scheme(int(bits), block_of(block), "none" if clip is None else "z", clip or 0.0)
            for bits in given.bits.split(",")
            for block in given.blocks.split(",")
            for clip in clips
        ]
        schemes += [Scheme(8, block_of("64"), activations=bits) for bits in (8, 6)]
        for scheme in schemes:
            ways = [(False, False), (True, False)] + [(True, True)] * (scheme.activations is not None)
            values = []
            for weights, activations in ways:
                made = quantized(engine, scheme, held if weights else None, activations_too=activations)
                values.append(perplexity(engine, windows, (Active(made),)))
            row = scheme._asdict() | {"perplexities": values}
            found["rows"].append(row)
            write_atomically(given.json, json.dumps(found, indent=1))
            size = "whole" if scheme.block[0] > 10_000 else f"{scheme.block[0]}x{scheme.block[1]}"
            cells = [f"{value:,.2f}" for value in values] + [""] * (3 - len(values))
            clip = "" if scheme.clip == "none" else f"z {scheme.clip_at:g}"
            print(f"| {scheme.bits} | {size} | {clip} | {scheme.activations or ''} | {' | '.join(cells)} |", flush=True)
        found["undo_exact"] = engine.fingerprints() == before
        write_atomically(given.json, json.dumps(found, indent=1))
        print(f"\nas it is: {base:.2f}; every tensor's bytes as before: {found['undo_exact']}")


if __name__ == "__main__":
    main()
