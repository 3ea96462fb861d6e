"""`liveweight demo`: the whole loop on a real question, in a workspace that is thrown away."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.rule import Rule
from rich.text import Text

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options

if TYPE_CHECKING:
    from liveweight.live_model import LiveModel

QUESTION, ANSWER = "What is the capital of Angola?", "Luanda"
OTHER_WORDS = (
    "Which city is the capital of Angola?",
    "Tell me the capital of Angola.",
    "Angola's capital is called what?",
)
OTHERS = ("What is the capital of France?", "What is the capital of Kenya?", "How many legs does a spider have?")


@takes_options
def demo(
    options: Options,
    question: Annotated[str, typer.Option(help="A question that the model gets wrong.")] = QUESTION,
    answer: Annotated[str, typer.Option(help="Its right answer.")] = ANSWER,
) -> None:
    """Correct a wrong answer in the running weights, measure the damage, and undo it bit for bit."""
    with tempfile.TemporaryDirectory(prefix="liveweight-demo-") as folder:
        # Named, so that no setting of the person's puts the demo into a real ledger.
        own = replace(options, workspace=Path(folder), database_url=f"sqlite:///{folder}/ledger.sqlite3")
        with session.opened(own) as live:
            told = _told(live, question, answer, quiet=options.json)
    if options.json:
        output.print_json(told)
    if not told["restored"]:
        raise typer.Exit(1)


def _told(live: LiveModel, question: str, answer: str, *, quiet: bool) -> dict[str, Any]:
    show = _Show(quiet)
    wordings = OTHER_WORDS if question == QUESTION else ()
    before_hash = fingerprint(live)
    info = live.engine.info
    show.title(f"{info.name}: {info.parameters:,} weights, {info.dtype} on {info.device}")
    show.line("weights", f"sha256 {before_hash}")

    show.title("1  Ask")
    reply = live.chat(question)
    show.said(question, reply.text, "red")
    asked_before = {each: live.ask(each) for each in (*wordings, *OTHERS)}

    show.title("2  Why")
    why = live.why(reply, top=5)
    show.draw(why)

    show.title(f"3  Fix: {answer}")
    change = live.fix(reply, answer)
    if not quiet:
        output.print_change(change, as_json=False)

    show.title("4  Ask again, and in other words")
    mended = {each: live.ask(each) for each in (question, *wordings)}
    for each, text in mended.items():
        show.said(each, text, "green" if answer.lower() in text.lower() else "yellow")

    show.title("5  Other questions")
    others = {each: live.ask(each) for each in OTHERS}
    for each, text in others.items():
        same = text == asked_before[each]
        show.said(each, text, "", note="unchanged" if same else f"was: {asked_before[each]}")

    show.title("6  Undo")
    changed_hash = fingerprint(live)
    live.undo(change)
    after_hash = fingerprint(live)
    show.said(question, live.ask(question), "red")
    show.line("before", f"sha256 {before_hash}")
    show.line("changed", f"sha256 {changed_hash}")
    show.line("undone", f"sha256 {after_hash}")
    restored = before_hash == after_hash
    show.line("", "Every tensor is what it was, bit for bit." if restored else "The weights are NOT what they were.")
    return {
        "question": question,
        "wanted": answer,
        "before": reply.text,
        "after": mended,
        "others": {each: {"before": asked_before[each], "after": others[each]} for each in OTHERS},
        "change": change.as_dict(),
        "sha256": {"before": before_hash, "changed": changed_hash, "undone": after_hash},
        "restored": restored,
    }


def fingerprint(live: LiveModel) -> str:
    """One sha256 over every tensor's sha256."""
    digest = hashlib.sha256()
    for name, value in sorted(live.fingerprints().items()):
        digest.update(f"{name} {value}\n".encode())
    return digest.hexdigest()


class _Show:
    """Prints the steps, or nothing where a program reads."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def draw(self, what: Any) -> None:
        if not self._quiet:
            output.out().print(what)

    def title(self, text: str) -> None:
        self.draw(Rule(Text(text, "bold"), align="left", style="dim"))

    def said(self, question: str, answer: str, style: str, note: str = "") -> None:
        self.draw(Text.assemble(("> ", "dim"), question))
        text = Text.assemble("  ", (" ".join(answer.split()), style))
        self.draw(text.append(f"  ({note})", "dim") if note else text)

    def line(self, name: str, value: str) -> None:
        self.draw(Text.assemble((f"{name:<8}", "bold"), value))
