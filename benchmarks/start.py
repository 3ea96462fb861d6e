"""Seconds from a cold command to the first token, in a fresh process each time.

    python benchmarks/start.py --rounds 5

The first start converts the model where that was not done yet and is reported apart; the others find the converted
file and map it. A start is everything: Python, imports, opening the workspace, loading, reading the question.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from statistics import median

CHILD = """
import sys
from liveweight import LiveModel
with LiveModel.load(sys.argv[1], workspace=sys.argv[2]) as live:
    stream = live.stream("What is the capital of France?", max_tokens=8)
    token = next(stream)
    print(token.text, flush=True)
    stream.close()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the model: smollm2, a hub id, a folder or a .gguf file")
    parser.add_argument("--rounds", type=int, default=5, help="starts after the first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="liveweight-start-") as folder:
        spent = [start(options.model, folder) for _ in range(options.rounds + 1)]
    first, later = spent[0], spent[1:]
    middle = median(later)
    verdict = "yes" if middle <= 5 else "**no**"
    print("| what | to reach | measured | |\n|---|---|---|---|")
    print(f"| first start here to first token, s | | {first:.2f} | |")
    told = f"{middle:.2f} ({min(later):.2f} to {max(later):.2f})"
    print(f"| second start to first token, s, median of {len(later)} | ≤ 5 | {told} | {verdict} |")
    return 0


def start(model: str, folder: str) -> float:
    """Seconds until a fresh process writes its first token."""
    begun = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", CHILD, model, folder], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None  # it is a pipe
        line = child.stdout.readline()
        spent = time.perf_counter() - begun
    if child.returncode or not line.strip():
        raise SystemExit(f"The start failed with exit code {child.returncode}; what it said stands above.")
    print(f"{spent:.2f} s", file=sys.stderr)
    return spent


if __name__ == "__main__":
    sys.exit(main())
