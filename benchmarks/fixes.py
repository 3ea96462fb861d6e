"""What a fix, a bad and a good do to the embedded model: every figure of docs/benchmarks.md but the speeds.

    python benchmarks/fixes.py --data ../shared/data --json fixes.json

Asks about capitals, languages and currencies, country by country, until it has the first 60 questions that the model
gets wrong and the first 100 that it gets right, and then measures:

    single  each wrong question fixed alone, and undone: asked again, in four held-out wordings, 100 neighbours, KL, ppl
    lora    the first of them by PEFT's LoRA on the same contexts
    all     30 good answers, then every fix in one model; then all of it undone in random order
    bad     30 wrong answers judged bad without a right one

Everything is judged by greedy free generation through the chat template, in the reply's first sentence. Progress goes
to stderr, the table to stdout, every case to the JSON file as soon as it is done, so that --resume goes on after it.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from figures import table
from liveweight import Change, LiveModel, Reply
from liveweight.errors import GuardRefused, InvalidInput, LiveweightError, NoEffect, NoMendFound, StateConflict
from liveweight.evaluation import (
    Kept,
    KLMeter,
    NeighbourMeter,
    PerplexityMeter,
    answer_batch,
    babbles,
    first_sentence,
    fluency,
    gives_another,
    instructions,
    normalised,
    plain_text,
    same_first_sentence,
    says,
)
from liveweight.evaluation.records import Records
from liveweight.methods import Case, build_case
from liveweight.settings import Settings
from records import Asked, base_answers

TOKENS = 32  # of a reply that is judged by its first sentence
LONG = 64  # of a reply that is searched for babble
PHASES = ("single", "lora", "all", "bad")
ALIASES = {"good": "all", "undo": "all"}  # these are measured where all the fixes are in one model
GOODS = 30
BADS = 30
LORAS = 20
SEED = 0


def main() -> int:
    options = parsed()
    try:
        return run(options)
    except LiveweightError as error:
        print(f"{error.message} {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. What was measured is in the JSON file; --resume goes on.", file=sys.stderr)
        return 130


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of countries.json and others")
    parser.add_argument("--model", default="smollm2", help="the model: smollm2, a hub id, a folder or a .gguf file")
    parser.add_argument("--method", default=None, help="one method instead of the ladder")
    parser.add_argument("--cases", type=int, default=60, metavar="N", help="wrong questions to mend")
    parser.add_argument("--neighbours", type=int, default=100, metavar="N", help="right answers that should stay")
    parser.add_argument("--every", type=int, default=5, metavar="K", help="measure KL and perplexity on each K-th case")
    parser.add_argument("--text-tokens", type=int, default=4096, metavar="N", help="tokens of plain text")
    parser.add_argument("--lora-rate", type=float, default=1e-3, help="Adam's rate for PEFT's LoRA")
    parser.add_argument("--lora-contexts", type=int, default=None, metavar="N", help="contexts for LoRA; unset is all")
    parser.add_argument("--only", default=",".join(PHASES), help=f"parts to run, of {', '.join((*PHASES, *ALIASES))}")
    parser.add_argument("--json", type=Path, default=Path("fixes.json"), help="where every case is written")
    parser.add_argument("--markdown", type=Path, default=None, help="where the table is written, too")
    parser.add_argument("--resume", action="store_true", help="go on after the cases that the JSON file holds")
    options = parser.parse_args()
    names = [ALIASES.get(name, name) for name in options.only.split(",")]
    for name in names:
        if name not in PHASES:
            parser.error(f"--only: there is no part {name!r}; choose from {', '.join((*PHASES, *ALIASES))}")
    options.only = [name for name in PHASES if name in names]
    for name in ("cases", "neighbours", "every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    return options


def run(options: argparse.Namespace) -> int:
    with model(options) as live:
        wrong, right = base_answers(live, options.data, options.cases, options.neighbours, TOKENS)
        records = Records.open(
            options.json,
            {
                "model": live.engine.info.hash,
                "method": options.method or "auto",
                "cases": options.cases,
                "neighbours": options.neighbours,
                "every": options.every,
                "text_tokens": options.text_tokens,
            },
            resume=options.resume,
        )
        meters = Meters(live, options, right)
    parts: dict[str, Callable[..., None]] = {"single": single, "lora": lora, "all": together, "bad": bad}
    for name in options.only:
        kept = options.json.with_suffix(".workspace") if name == "all" else None
        with model(options, kept) as live:
            parts[name](options, live, meters.on(live), records, wrong, right)
        if kept is not None:
            shutil.rmtree(kept)
    text = table(records.data)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


class Meters:
    """The three meters, whose references are made once and used on every fresh copy of the same model."""

    def __init__(self, live: LiveModel, options: argparse.Namespace, right: list[Asked]) -> None:
        """Make the references on the base."""
        engine = live.engine
        kept = [Kept(each.question, tuple(each.reply), tuple(each.answers)) for each in right]
        say("references for KL and perplexity")
        self.neighbours = NeighbourMeter(engine, kept, TOKENS)
        self.kl = KLMeter(engine, instructions(options.data)[:100])
        self.perplexity = PerplexityMeter(engine, plain_text(options.data), tokens=options.text_tokens)

    def on(self, live: LiveModel) -> Meters:
        """The same meters, reading another copy of the model."""
        for meter in (self.neighbours, self.kl, self.perplexity):
            meter.engine = live.engine
        return self


# ------------------------------------------------------------------------------------------------------- the parts


def single(
    options: argparse.Namespace, live: LiveModel, meters: Meters, records: Records, wrong: list[Asked], right: Any
) -> None:
    """Each fix alone, undone afterwards."""
    for number, asked in steps("fix, one at a time", wrong, records.rows("single")):
        reply = live.chat(asked.question, max_tokens=TOKENS)
        require_held_out(case_of(live, reply, asked), asked)
        row, change = judged(lambda reply=reply, asked=asked: live.fix(reply, asked.wanted, method=options.method))
        row |= {"question": asked.question, "wanted": asked.wanted, "before": reply.text}
        row |= answers_to(live, asked)
        found = meters.neighbours.measure()
        row |= {"neighbours": found.count, "unchanged": found.unchanged, "still_right": found.right}
        row["changed"] = list(found.changed)
        if number % options.every == 0:
            values = meters.kl.measure()
            row |= {"kl": sum(values) / len(values), "worst_kl": max(values), "perplexity": meters.perplexity.ratio()}
        if change is not None:
            live.undo(change)
        records.add("single", row)


def lora(
    options: argparse.Namespace, live: LiveModel, meters: Meters, records: Records, wrong: list[Asked], right: Any
) -> None:
    """The first cases by PEFT's LoRA, on the contexts that the methods get."""
    from lora import trained  # PEFT is only needed here

    for _, asked in steps("PEFT LoRA", wrong[:LORAS], records.rows("lora")):
        reply = live.chat(asked.question, max_tokens=TOKENS)
        case = case_of(live, reply, asked)
        contexts = case.contexts[: options.lora_contexts]
        with trained(live.engine, contexts, rate=options.lora_rate) as run:
            row = {"question": asked.question, "seconds": run.seconds, "steps": run.steps, "reached": run.reached}
            row["contexts"] = len(contexts)
            row |= answers_to(live, asked)
            found = meters.neighbours.measure()
            row |= {"neighbours": found.count, "unchanged": found.unchanged, "still_right": found.right}
        records.add("lora", row)


def together(
    options: argparse.Namespace,
    live: LiveModel,
    meters: Meters,
    records: Records,
    wrong: list[Asked],
    right: list[Asked],
) -> None:
    """Good answers first, then every fix in one model, then all of it undone in random order.

    Its workspace lies beside the JSON file until the part is done, so that it can be resumed.
    """
    if records.rows("all"):
        return
    base = records.data.setdefault("base", live.fingerprints())
    for _, asked in steps("good", right[:GOODS], records.rows("goods")):
        reply = live.chat(asked.question, max_tokens=TOKENS)
        row, _ = judged(lambda reply=reply: live.good(reply))
        records.add("goods", row | {"question": asked.question, "reply": reply.text})
    for _, asked in steps("fixes in one model", wrong, records.rows("fixes")):
        reply = live.chat(asked.question, max_tokens=TOKENS)
        row = {"question": asked.question, "before": reply.text}
        if says(reply.text, asked.wanted):
            records.add("fixes", row | {"already": True})
            continue
        done, _ = judged(lambda reply=reply, asked=asked: live.fix(reply, asked.wanted, method=options.method))
        records.add("fixes", row | done)
    say("measuring the model with every fix in it")
    texts = answer_batch(live.engine, [each.question for each in wrong], TOKENS)
    held = answer_batch(live.engine, [text for each in wrong for text in each.held_out], TOKENS)
    unseen = answer_batch(live.engine, [text for each in wrong for text in each.unseen], TOKENS)
    wanted = [each.wanted for each in wrong for _ in each.held_out]
    found = meters.neighbours.measure()
    values = meters.kl.measure()
    goods = records.rows("goods")
    protected = answer_batch(live.engine, [row["question"] for row in goods], TOKENS)
    summary = {
        "right": [says(text, asked.wanted) for text, asked in zip(texts, wrong, strict=True)],
        "held_out": [says(text, answer) for text, answer in zip(held, wanted, strict=True)],
        "unseen": [says(text, answer) for text, answer in zip(unseen, wanted, strict=True)],
        "texts": texts,
        "neighbours": found.count,
        "unchanged": found.unchanged,
        "still_right": found.right,
        "changed": list(found.changed),
        "kl": sum(values) / len(values),
        "perplexity": meters.perplexity.ratio(),
        "goods_same": [same_first_sentence(a, row["reply"]) for a, row in zip(protected, goods, strict=True)],
    }
    summary["undone"] = undo_all(live)
    after = live.fingerprints()
    summary["tensors"] = len(base)
    summary["tensors_equal"] = sum(after[name] == digest for name, digest in base.items())
    records.add("all", summary)


def undo_all(live: LiveModel) -> int:
    """Undo in random order until nothing is on or off; an undo brings back what it had replaced."""
    order, count = random.Random(SEED), 0
    while left := [change for change in live.changes() if change.state in ("active", "off")]:
        live.undo(order.choice(left))
        count += 1
    return count


def bad(
    options: argparse.Namespace, live: LiveModel, meters: Meters, records: Records, wrong: list[Asked], right: Any
) -> None:
    """Wrong answers judged bad, without a right one; each undone afterwards."""
    for _, asked in steps("bad", wrong[:BADS], records.rows("bad")):
        questions = [asked.question, *asked.held_out[:3]]
        before = answer_batch(live.engine, questions, LONG)
        reply = live.chat(asked.question, max_tokens=TOKENS)
        row, change = judged(lambda reply=reply: live.bad(reply, method=options.method))
        texts = answer_batch(live.engine, questions, LONG)
        row |= {
            "question": asked.question,
            "before": reply.text,
            "texts": texts,
            "another": [gives_another(asked.question, reply.text, text) for text in texts],
            "another_before": [gives_another(asked.question, reply.text, text) for text in before],
            "babble": [babbles(text) for text in texts],
            "babble_before": [babbles(text) for text in before],
            "fluency": [fluency(text) for text in texts],
            "fluency_before": [fluency(text) for text in before],
        }
        if change is not None:
            live.undo(change)
        records.add("bad", row)


# --------------------------------------------------------------------------------------------------------- helpers


@contextmanager
def model(options: argparse.Namespace, workspace: Path | None = None) -> Iterator[LiveModel]:
    """The model in its base state with a workspace that is thrown away, or as the given workspace has it."""
    with tempfile.TemporaryDirectory(prefix="liveweight-benchmark-") as folder:
        settings = Settings(model=options.model, workspace=workspace or Path(folder))
        with LiveModel.load(settings=settings, progress=False) as live:
            yield live


def judged(judge: Callable[[], Change]) -> tuple[dict[str, Any], Change | None]:
    """What a judgement came to and what it took; the change, where one was committed."""
    begun = time.perf_counter()
    try:
        change = judge()
    except (NoMendFound, GuardRefused, NoEffect, StateConflict) as error:
        return {"state": error.code, "why": error.message, "wall": time.perf_counter() - begun}, None
    wall = time.perf_counter() - begun
    seconds = dict(change.report.seconds) if change.report else {}
    row = {"state": change.state, "method": change.method, "wall": wall, "seconds_by_phase": seconds}
    row["propose"] = seconds.get("case", 0.0) + seconds.get("propose", 0.0)
    return row, change if change.id is not None else None


def answers_to(live: LiveModel, asked: Asked) -> dict[str, Any]:
    """Whether the wanted answer comes: to the question as asked, and in the held-out wordings."""
    texts = answer_batch(live.engine, [asked.question, *asked.held_out, *asked.unseen], TOKENS)
    first, *others = (says(text, asked.wanted) for text in texts)
    split = len(asked.held_out)
    row = {"right": first, "held_out": others[:split], "unseen": others[split:]}
    return row | {"texts": [first_sentence(text) for text in texts]}


def case_of(live: LiveModel, reply: Reply, asked: Asked) -> Case:
    """The case that a fix of this reply is made from."""
    tokens = [token for token in reply.tokens if token not in live.engine.format.end_tokens]
    return build_case(live.engine, reply.prompt, reply.text, tokens, kind="fix", wanted=asked.wanted)


def require_held_out(case: Case, asked: Asked) -> None:
    """Raises InvalidInput where a held-out wording is one that the methods see."""
    seen = {normalised(message.content) for context in case.contexts for message in context.messages}
    leaked = [wording for wording in (*asked.held_out, *asked.unseen) if normalised(wording) in seen]
    if leaked:
        raise InvalidInput(
            f"The held-out wording {leaked[0]!r} is one of the contexts that a fix of {asked.question!r} is fitted to.",
            hint="Take it out of the re-phrasings that ship with the methods; the figure would mean nothing.",
        )


def steps(what: str, cases: list[Asked], done: list[Any]) -> Iterator[tuple[int, Asked]]:
    """The cases that are left, numbered as in the whole, with a bar on stderr."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=len(cases), completed=len(done))
        for number, asked in list(enumerate(cases))[len(done) :]:
            yield number, asked
            bar.advance(task)


def say(what: str) -> None:
    print(what, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
