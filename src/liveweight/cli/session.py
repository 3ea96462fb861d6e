"""A model opened for one verb.

Owns the way from options to a `LiveModel` with progress on stderr, and which reply a verb means. Knows no verb.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from liveweight.cli import output
from liveweight.cli.options import Options

if TYPE_CHECKING:
    from liveweight.ledger import Ledger
    from liveweight.live_model import LiveModel
    from liveweight.reports import Reply
    from liveweight.settings import Settings


@contextmanager
def opened(options: Options) -> Iterator[LiveModel]:
    """The model of these options with its workspace; closed in the end."""
    from liveweight.live_model import LiveModel

    settings = options.settings()
    say = output.say if not options.json else _quiet
    shown = not options.json and output.progress().is_terminal
    with LiveModel.load(settings=settings, say=say, progress=shown) as live:
        for notice in live.notices:
            output.progress().print(Text(notice, style="yellow"))
        if options.verbose:
            info = live.engine.info
            output.say(f"{info.name}: {info.architecture}, {info.dtype} on {info.device}, {live.engine.version}")
        yield live


@contextmanager
def reading(options: Options) -> Iterator[Ledger]:
    """The workspace's ledger alone, beside any process that has it open."""
    from liveweight.ledger import Ledger

    settings = options.settings()
    with Ledger.open(settings.workspace, settings.database_url, read_only=True) as ledger:
        yield ledger


def meant(live: LiveModel, reply: str | None, question: str | None = None) -> Reply:
    """The reply that a verb is about: the one named, the answer to a question asked now, or the last one.

    Raises UnknownReply when there is none.
    """
    from liveweight.errors import InvalidInput, UnknownReply

    if reply is not None and question is not None:
        raise InvalidInput("Give a question or --reply, not both.", hint="--reply judges an earlier answer.")
    if reply is not None:
        return live.reply(reply)
    if question is not None:
        output.say(f"asking: {question}")
        return live.chat(question)
    last = live.replies(limit=1)
    if not last:
        raise UnknownReply("This workspace holds no reply yet.", hint="Ask something first, or give the question.")
    return last[0]


def model_hash(ledger: Ledger, settings: Settings) -> str | None:
    """The settings' model as the ledger knows it; the newest where it was several checkpoints. Says where it is new."""
    name, revision, path = settings.model, settings.revision, Path(settings.model).expanduser()
    known = ledger.models()
    meant = {name, str(path.resolve())} if path.exists() else {name}
    found = [model for model in known if model.name in meant or model.source in meant]
    if revision is not None:
        found = [model for model in found if model.source == f"{name}@{revision[:12]}"] or found
    if known and not found:
        names = ", ".join(dict.fromkeys(model.name for model in known))
        output.say(f"{name} has not been used in this workspace; what has is {names}")
    return found[-1].hash if found else None


def _quiet(_: str) -> None:
    """Say nothing: stderr is for a program."""
