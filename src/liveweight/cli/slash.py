"""The chat's slash commands: the verbs, spelt the same, on the reply that was just read.

Owns their grammar and what they print. Knows nothing of how lines are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from liveweight.cli import output
from liveweight.errors import InvalidInput, UnknownReply
from liveweight.shown import table

if TYPE_CHECKING:
    from liveweight.live_model import LiveModel
    from liveweight.reports import Change, Reply


@dataclass
class Talk:
    """One running chat: the model and the reply that commands are about."""

    live: LiveModel
    read: Callable[[str], str | None] = lambda prompt: None  # the next line; None at the end
    last: Reply | None = None
    as_json: bool = False

    def tell(self, seen: RenderableType, value: Any) -> None:
        """What a command found: as a person sees it, or its value as a line of JSON."""
        if self.as_json:
            output.print_json_line(value)
        else:
            output.out().print(seen)

    @property
    def reply(self) -> Reply:
        """The last reply. Raises UnknownReply before the first."""
        if self.last is None:
            raise UnknownReply("There is no reply in this chat yet.", hint="Ask something first.")
        return self.last


@dataclass(frozen=True)
class Slash:
    """One command: how it is written, what it does, and what carries it out. True ends the chat."""

    form: str
    help: str
    run: Callable[[Talk, str], bool | None]


def run(talk: Talk, line: str) -> bool:
    """Carry out `/verb rest`; whether the chat is over. Raises InvalidInput for an unknown one."""
    name, _, rest = line[1:].strip().partition(" ")
    command = COMMANDS.get(name.lower())
    if command is None:
        raise InvalidInput(f"There is no command /{name}.", hint="/help lists them.")
    return bool(command.run(talk, rest.strip()))


def _good(talk: Talk, rest: str) -> None:
    _shown(talk, talk.live.good(talk.reply, rest or None))


def _bad(talk: Talk, rest: str) -> None:
    _shown(talk, talk.live.bad(talk.reply, rest or None))


def _fix(talk: Talk, rest: str) -> None:
    _shown(talk, talk.live.fix(talk.reply, rest))


def _why(talk: Talk, rest: str) -> None:
    found = talk.live.why(talk.reply, against=rest or None, top=8)
    talk.tell(found, {"reply": talk.reply.label, **found.model_dump(mode="json")})


def _step(talk: Talk, rest: str) -> None:
    from liveweight.cli import step

    if talk.as_json:
        raise InvalidInput(
            "/step is a conversation, and --json has none.", hint="Use `liveweight step PROMPT --json` with --set."
        )
    step.interact(talk.live, talk.live.step(rest or talk.reply.prompt), lambda: talk.read("step> "))


def _changes(talk: Talk, rest: str) -> None:
    found = talk.live.changes()
    talk.tell(output.changes_view(found), [each.as_dict() for each in found])


def _show(talk: Talk, rest: str) -> None:
    _shown(talk, talk.live.change(_id(rest)))


def _undo(talk: Talk, rest: str) -> None:
    _line(talk, talk.live.undo(rest or None))


def _off(talk: Talk, rest: str) -> None:
    _line(talk, talk.live.off(_id(rest)))


def _on(talk: Talk, rest: str) -> None:
    _line(talk, talk.live.on(_id(rest)))


def _strength(talk: Talk, rest: str) -> None:
    change, _, value = rest.partition(" ")
    try:
        number = float(value)
    except ValueError as error:
        raise InvalidInput(f"{value!r} is not a strength.", hint="Write /strength c3 0.5.") from error
    _line(talk, talk.live.set_strength(_id(change), number))


def _fold(talk: Talk, rest: str) -> None:
    _shown(talk, talk.live.fold(_id(rest)))


def _history(talk: Talk, rest: str) -> None:
    turns = talk.last.history if talk.last is not None else ()
    lines = [Text.assemble((f"{turn.role}: ", "bold"), turn.content) for turn in turns]
    talk.tell(Text("\n").join(lines), [{"role": turn.role, "content": turn.content} for turn in turns])


def _new(talk: Talk, rest: str) -> None:
    talk.last = None
    talk.tell(Text("a new chat", "dim"), {"chat": "new"})


def _help(talk: Talk, rest: str) -> None:
    shown = table("command", "what it does")
    for command in COMMANDS.values():
        shown.add_row(Text(command.form, "bold"), command.help)
    talk.tell(shown, {command.form: command.help for command in COMMANDS.values()})


def _quit(talk: Talk, rest: str) -> bool:
    return True


COMMANDS = {
    "good": Slash("/good [why]", "protect the last answer", _good),
    "bad": Slash("/bad [why]", "stop giving the last answer", _bad),
    "fix": Slash("/fix TEXT", "give TEXT as the answer instead", _fix),
    "why": Slash("/why [TEXT]", "the neurons behind the last answer (rather than TEXT)", _why),
    "step": Slash("/step [TEXT]", "step through the last answer's prompt (or through TEXT)", _step),
    "changes": Slash("/changes", "list every change", _changes),
    "show": Slash("/show ID", "a change's whole report", _show),
    "undo": Slash("/undo [ID]", "take the newest change, or that one, back for good", _undo),
    "off": Slash("/off ID", "switch a change off", _off),
    "on": Slash("/on ID", "switch it on again", _on),
    "strength": Slash("/strength ID X", "weaken or amplify it", _strength),
    "fold": Slash("/fold ID", "say a change that acts while the model runs in the weights", _fold),
    "history": Slash("/history", "this chat so far", _history),
    "new": Slash("/new", "begin a new chat", _new),
    "help": Slash("/help", "this list", _help),
    "quit": Slash("/quit", "leave (also Ctrl-D)", _quit),
}


def _id(text: str) -> str:
    if not text:
        raise InvalidInput("Which change?", hint="Give its id, such as c3; /changes lists them.")
    return text


def _shown(talk: Talk, change: Change) -> None:
    talk.tell(change, change.as_dict())


def _line(talk: Talk, change: Change) -> None:
    said = Text.assemble((change.label, "bold"), " ", change.state_text())
    said.append(f" at strength {change.strength:g}: {change.question}")
    talk.tell(said, {**change.as_dict(), "version": str(talk.live.engine.version)})
