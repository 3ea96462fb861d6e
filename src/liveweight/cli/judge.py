"""`liveweight fix`, `bad` and `good`: what a person says of an answer.

The three verbs differ only in what is said; their options are the same, so they stand in one file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_method_settings, takes_options

if TYPE_CHECKING:
    from liveweight.reports import Kind

Method = Annotated[str | None, typer.Option(help="Which method proposes; auto tries them in turn.")]
Preview = Annotated[bool, typer.Option("--preview", help="Show the report and commit nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Commit over the guard's budget; the ledger says so.")]
KeepBoth = Annotated[bool, typer.Option("--keep-both", help="Keep earlier changes that this one contradicts.")]
WhichReply = Annotated[str | None, typer.Option("--reply", "-r", help="An earlier reply by its id, such as r3.")]
Question = Annotated[str | None, typer.Argument(help="Ask this now, and judge the answer; else the last reply.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why, in your words; kept with the feedback.")]


@takes_options
@takes_method_settings
def fix(
    options: Options,
    question: Annotated[str, typer.Argument(help="The question (or, with --reply, the right answer).")],
    answer: Annotated[str | None, typer.Argument(help="The right answer.")] = None,
    reply: WhichReply = None,
    method: Method = None,
    preview: Preview = False,
    force: Force = False,
    keep_both: KeepBoth = False,
) -> None:
    """Make the model give another answer: fix "What is the capital of Angola?" "Luanda"."""
    asked: str | None = question
    wanted = answer
    if answer is None and reply is not None:
        asked, wanted = None, question
    if wanted is None:
        raise typer.BadParameter("Give the right answer too.", param_hint="ANSWER")
    how = {"method": method, "preview": preview, "force": force, "keep_both": keep_both}
    _judge(options, "fix", reply, asked, wanted, how)


@takes_options
@takes_method_settings
def bad(
    options: Options,
    question: Question = None,
    reply: WhichReply = None,
    reason: Reason = None,
    method: Method = None,
    preview: Preview = False,
    force: Force = False,
    keep_both: KeepBoth = False,
) -> None:
    """Make the model stop giving an answer. It does not teach a right one: `fix` does."""
    how = {"method": method, "preview": preview, "force": force, "keep_both": keep_both}
    _judge(options, "bad", reply, question, reason, how)


@takes_options
@takes_method_settings
def good(
    options: Options,
    question: Question = None,
    reply: WhichReply = None,
    reason: Reason = None,
    method: Method = None,
    preview: Preview = False,
    force: Force = False,
    keep_both: KeepBoth = False,
) -> None:
    """Protect an answer from later changes, and make the model surer of it where its lead is thin."""
    how = {"method": method, "preview": preview, "force": force, "keep_both": keep_both}
    _judge(options, "good", reply, question, reason, how)


def _judge(
    options: Options, verb: Kind, reply: str | None, question: str | None, said: str | None, how: dict[str, Any]
) -> None:
    """Judge the reply that is meant, `said` being the right answer or the reason, and show what came of it."""
    with session.opened(options) as live:
        change = getattr(live, verb)(session.meant(live, reply, question), said, **how)
        output.print_change(change, as_json=options.json)
