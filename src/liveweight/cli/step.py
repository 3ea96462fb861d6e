"""`liveweight step`: a debugger for a forward pass, for scripts and for people.

Owns the grammar of breaks and edits (`POSITION,INDEX=VALUE`), the commands of the interactive session and what they
print. What is stopped, looked at and changed is `tracing.stepping`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options
from liveweight.errors import InvalidInput, LiveweightError
from liveweight.shown import table

if TYPE_CHECKING:
    from torch import Tensor

    from liveweight.live_model import LiveModel
    from liveweight.reports import Change
    from liveweight.tracing import Ending, Run, TokenGuess, View

_FORM = "Write POSITION,INDEX=VALUE, such as 3,17=2.5; * is all, -1 the last."
_EDITS = ("set", "scale", "add")


@takes_options
def step(
    options: Options,
    prompt: Annotated[str, typer.Argument(help="The question; with --raw any text.")],
    breaks: Annotated[
        list[str] | None, typer.Option("--break", "-b", help="Stop at this site; may be repeated.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Put a value: [SITE@]POSITION,INDEX=VALUE.")] = None,
    scale: Annotated[list[str] | None, typer.Option(help="Multiply: [SITE@]POSITION,INDEX=FACTOR.")] = None,
    add: Annotated[
        list[str] | None, typer.Option(help="Add: [SITE@]POSITION,INDEX=VALUE; a .json file is a vector.")
    ] = None,
    look: Annotated[bool, typer.Option("--look", help="Show what stands at each stop, after the edits there.")] = False,
    top: Annotated[int, typer.Option(min=1, help="The largest entries that are shown.")] = 10,
    position: Annotated[int | None, typer.Option(help="Look at one token only; -1 is the last.")] = None,
    answer: Annotated[int, typer.Option(min=0, help="Go on for so many tokens, without and with the edits.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Plain text, without the chat's template.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Commit what was done, if the guard agrees.")] = False,
    name: Annotated[str, typer.Option(help="The kept change's name.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Keep it over the guard's budget.")] = False,
) -> None:
    """Stop a forward pass between its layers, look, change what is there, go on, and keep what was done.

    Without --set, --scale, --add, --look, --answer, --keep or --json it reads commands, from a terminal or from a pipe;
    `help` lists them.
    """
    given = {"set": set_ or [], "scale": scale or [], "add": add or []}
    edits = [_parsed(verb, text) for verb, texts in given.items() for text in texts]
    stops = list(breaks or [])
    with session.opened(options) as live, live.step(prompt, raw=raw) as run:
        if not (edits or look or answer or keep or options.json):
            _interact(live, run, stops)
            return
        shown = _scripted(run, stops, edits, (top, position) if look or options.json else None)
        ending = run.finish()
        texts = {word: run.generate(answer, edited=word == "after") for word in ("before", "after")} if answer else {}
        if options.json:
            told = {
                "prompt": prompt,
                "tokens": list(run.tokens),
                "stops": [view.model_dump(mode="json") for view in shown],
                "edits": [{"site": edit.site, "did": edit.said} for edit in run.edits],
                "next": ending.model_dump(mode="json"),
                "answer": texts or None,
            }
            change: Change | None = None
            try:
                change = _keep(live, run, name, force) if keep else None
            finally:  # what was seen is told also where the guard refuses
                output.print_json({**told, "change": None if change is None else change.as_dict()})
            return
        for view in shown:
            output.out().print(look_view(view))
        output.out().print(ending_view(ending, bool(run.edits)))
        for word, text in texts.items():
            output.out().print(Text.assemble((f"{word}: ", "bold"), text))
        if keep:
            output.print_change(_keep(live, run, name, force), as_json=False)


def _keep(live: LiveModel, run: Run, name: str, force: bool) -> Change:
    return live.apply(run.adjustment(name), prompt=run.question or None, force=force)


# ------------------------------------------------------------------------------------------------------- edits


@dataclass(frozen=True)
class Wish:
    """An edit as it was written."""

    verb: str
    site: str | None
    position: int | None
    index: int | None
    value: float | Path

    def carry_out(self, run: Run) -> None:
        """Do it where the run stands."""
        value: float | Tensor = _vector(self.value) if isinstance(self.value, Path) else self.value
        getattr(run, self.verb)(value, self.position, self.index)


def _parsed(verb: str, text: str) -> Wish:
    site, at, rest = text.rpartition("@")
    place, equals, value = rest.partition("=")
    numbers = [part.strip() for part in place.split(",")]
    if not equals or len(numbers) != 2:
        raise InvalidInput(f"{text!r} is no edit.", hint=_FORM)
    try:
        position, index = (None if number == "*" else int(number) for number in numbers)
        path = Path(value.strip())
        amount = path if path.suffix == ".json" else float(value)
    except ValueError as error:
        raise InvalidInput(f"{text!r} is no edit.", hint=_FORM) from error
    return Wish(verb, site if at else None, position, index, amount)


def _vector(path: Path) -> Tensor:
    """The list of numbers in a JSON file."""
    import json

    import torch

    try:
        return torch.tensor(json.loads(path.read_text("utf-8")), dtype=torch.float32)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"{path} is not a JSON list of numbers: {error}.", hint="Write [0.5, -1.0, …].") from error


def _scripted(run: Run, stops: Sequence[str], edits: Sequence[Wish], look: tuple[int, int | None] | None) -> list[View]:
    """Stop at each break in the order of the forward pass, and do there what was to be done there."""
    unnamed = next((wish for wish in edits if wish.site is None), None)
    if unnamed is not None and len(stops) != 1:
        many = f"{len(stops)} breaks" if stops else "no --break"
        raise InvalidInput(
            f"An edit names no site, and there are {many}.", hint="Write SITE@POSITION,INDEX=VALUE, or one --break."
        )
    sites = dict.fromkeys([*stops, *(wish.site for wish in edits if wish.site is not None)])
    for site in sites:
        run.until(site).restart()  # one that is not there is an error before anything is shown
    shown = []
    for site in sorted(sites, key=run.sites.index):
        run.until(site)
        for wish in edits:
            if (wish.site or stops[0]) == site:
                wish.carry_out(run)
        if look is not None:
            shown.append(run.look(*look))
    return shown


# ------------------------------------------------------------------------------------------------- interactive


@dataclass
class _Session:
    live: LiveModel
    run: Run
    stops: list[str]  # breaks that are still ahead


@dataclass(frozen=True)
class _Command:
    """How it is written, what it does, and what carries it out. True ends the session."""

    form: str
    help: str
    run: Callable[[_Session, str], bool | None]


def interact(live: LiveModel, run: Run, read: Callable[[], str | None], stops: Sequence[str] = ()) -> None:
    """Carry out commands until `quit` or the end of what `read` gives; errors are told and the session goes on."""
    for site in stops:
        run.until(site).restart()
    at = _Session(live, run, sorted(stops, key=run.sites.index))
    if at.stops:
        _go(at, "")
    while (line := read()) is not None:
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        try:
            command = _COMMANDS.get(_SHORT.get(word.lower(), word.lower()))
            if command is None:
                raise InvalidInput(f"There is no command {word!r}.", hint="help lists them.")
            if command.run(at, rest.strip()):
                return
        except LiveweightError as error:
            output.print_error(error, as_json=False)


def _interact(live: LiveModel, run: Run, stops: Sequence[str]) -> None:
    if sys.stdin.isatty():
        output.progress().print(f"{len(run.tokens)} tokens. `help` lists the commands, Ctrl-D leaves.", style="dim")
    interact(live, run, _read, stops)


def _read() -> str | None:
    try:
        if sys.stdin.isatty():
            return input("step> ")
        return sys.stdin.readline() or None
    except (EOFError, KeyboardInterrupt):
        output.progress().print()
        return None


def _next(at: _Session, rest: str) -> None:
    at.run.next()
    _stopped(at)


def _until(at: _Session, rest: str) -> None:
    at.run.until(rest)
    _stopped(at)


def _stopped(at: _Session) -> None:
    value = at.run.value
    norm = float(value[-1].norm())
    shape = " x ".join(map(str, value.shape))
    output.out().print(Text.assemble((at.run.site, "bold"), f"  {shape}, last token's norm {norm:.4g}"))


def _look(at: _Session, rest: str) -> None:
    output.out().print(look_view(at.run.look(position=_whole(rest))))


def _lens(at: _Session, rest: str) -> None:
    found = at.run.look(position=_whole(rest))
    if not found.lens:
        raise InvalidInput(f"{at.run.site} is not the residual stream.", hint="Stop at a layer's resid; try n.")
    output.out().print(_lens_table(found))


def _edit(verb: str) -> Callable[[_Session, str], None]:
    def carry_out(at: _Session, rest: str) -> None:
        wish = _parsed(verb, rest)
        if wish.site is not None:
            at.run.until(wish.site)
        wish.carry_out(at.run)
        _done(at)

    return carry_out


def _clamp(at: _Session, rest: str) -> None:
    try:
        pairs = [part.split("=") for part in rest.split()]
        values = {int(neuron): float(value) for neuron, value in pairs}
    except ValueError as error:
        raise InvalidInput(f"{rest!r} names no neurons.", hint="Write clamp 17=0 30=2.5.") from error
    at.run.clamp(values)
    _done(at)


def _undo(at: _Session, rest: str) -> None:
    output.out().print(Text(f"taken back: {at.run.undo().said}"))


def _edits(at: _Session, rest: str) -> None:
    for edit in at.run.edits:
        output.out().print(Text.assemble((edit.site, "bold"), f"  {edit.said}"))


def _done(at: _Session) -> None:
    edit = at.run.edits[-1]
    output.out().print(Text.assemble((edit.site, "bold"), f"  {edit.said}"))


def _go(at: _Session, rest: str) -> None:
    here = at.run.sites.index(at.run.site) if at.run.stopped else -1
    at.stops = [site for site in at.stops if at.run.sites.index(site) > here]
    if at.stops:
        at.run.until(at.stops.pop(0))
        _stopped(at)
    else:
        output.out().print(ending_view(at.run.finish(), bool(at.run.edits)))


def _answer(at: _Session, rest: str) -> None:
    output.out().print(Text(at.run.generate(_whole(rest) or 40)))


def _kept(at: _Session, rest: str) -> None:
    output.print_change(_keep(at.live, at.run, rest, False), as_json=False)


def _restart(at: _Session, rest: str) -> None:
    at.run.restart()


def _sites(at: _Session, rest: str) -> None:
    output.out().print(Text("  ".join(site for site in at.run.sites if rest in site)))


def _help(at: _Session, rest: str) -> None:
    shown = table("command", "what it does")
    for command in _COMMANDS.values():
        shown.add_row(Text(command.form, "bold"), command.help)
    output.out().print(shown)


def _quit(at: _Session, rest: str) -> bool:
    return True


_COMMANDS = {
    "next": _Command("n, next", "go on to the next layer's resid", _next),
    "until": _Command("until SITE", "go on to a site", _until),
    "look": _Command("look [POSITION]", "shape, norms, largest entries, logit lens or labels", _look),
    "lens": _Command("lens [POSITION]", "what the model would say, were this its last layer", _lens),
    "set": _Command("set P,I=VALUE", "put a value at token P, entry I; * is all, -1 the last", _edit("set")),
    "scale": _Command("scale P,I=FACTOR", "multiply", _edit("scale")),
    "add": _Command("add P,I=VALUE", "add; a .json file is a vector", _edit("add")),
    "clamp": _Command("clamp N=VALUE …", "hold neurons at values, at every token", _clamp),
    "undo": _Command("undo", "take the last edit back", _undo),
    "edits": _Command("edits", "what was done", _edits),
    "go": _Command("go", "on to the next break, or to the end: the next token, before and after", _go),
    "answer": _Command("answer [N]", "go on for N tokens with the edits", _answer),
    "keep": _Command("keep [NAME]", "commit what was done, if the guard agrees", _kept),
    "restart": _Command("restart", "back to the start, with the edits", _restart),
    "sites": _Command("sites [PART]", "where it can stop", _sites),
    "help": _Command("help", "this list", _help),
    "quit": _Command("quit", "leave (also Ctrl-D); nothing stays in the model but what was kept", _quit),
}
_SHORT = {"n": "next", "q": "quit", "g": "go"}


def _whole(text: str) -> int | None:
    try:
        return int(text) if text else None
    except ValueError as error:
        raise InvalidInput(f"{text!r} is not a whole number.", hint="Such as 3, or -1 for the last.") from error


# ------------------------------------------------------------------------------------------------------- views


def look_view(view: View) -> RenderableType:
    """A stop: its shape, the largest entries, and the logit lens of its last tokens."""
    length, size = view.shape
    head = Text.assemble((view.site, "bold"), f"  {length} tokens x {size}")
    head.append(f"  norms {min(view.norms):.4g} to {max(view.norms):.4g}, last {view.norms[-1]:.4g}", style="dim")
    labelled = any(entry.label for entry in view.largest)
    shown = table("token", "", "entry>", "value>", *(("promotes",) if labelled else ()))
    for entry in view.largest:
        row: list[Any] = [str(entry.position), Text(_quoted(entry.token)), str(entry.index), f"{entry.value:.4g}"]
        shown.add_row(*row, *([Text(entry.label)] if labelled else []))
    return Group(head, shown, *([_lens_table(view)] if view.lens else []), Text())


def _lens_table(view: View, most: int = 6) -> RenderableType:
    shown = table("token", "", "norm>", "logit lens")
    for row in view.lens[-most:]:
        said = "  ".join(f"{_quoted(guess.text)} {guess.probability:.2f}" for guess in row.top[:4])
        shown.add_row(str(row.position), Text(_quoted(row.token)), f"{view.norms[row.position]:.4g}", Text(said))
    return shown


def ending_view(ending: Ending, edited: bool) -> RenderableType:
    """The next token, without the edits and with them."""
    if not edited:
        return _guesses("next token", ending.before)
    shown = table("next token before", "probability>", "with the edits", "probability>")
    for old, new in zip(ending.before, ending.after, strict=True):
        cells = (Text(_quoted(old.text)), f"{old.probability:.3f}", Text(_quoted(new.text)), f"{new.probability:.3f}")
        shown.add_row(*cells)
    return Group(shown, Text(f"KL {ending.kl:.4f} nats", style="dim"))


def _guesses(title: str, guesses: Sequence[TokenGuess]) -> RenderableType:
    shown = table(title, "probability>")
    for guess in guesses:
        shown.add_row(Text(_quoted(guess.text)), f"{guess.probability:.3f}")
    return shown


def _quoted(text: str) -> str:
    return repr(text)[1:-1]
