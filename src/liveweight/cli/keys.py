"""`liveweight keys`: who may use the server. Works while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from liveweight.cli import output
from liveweight.cli.options import Options, takes_options
from liveweight.shown import table

if TYPE_CHECKING:
    from datetime import datetime

    from liveweight.ledger import Role
    from liveweight.server.keys import Keyring

keys = typer.Typer(help="Make, list and revoke the keys of the server. It may run meanwhile.", no_args_is_help=True)

_ROLES = ("chat", "editor")


@keys.command()
@takes_options
def create(
    options: Options,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is: changes say who made them.")],
    role: Annotated[str, typer.Option("--role", help="chat (talk and read) or editor (also change the model).")],
) -> None:
    """Make a key and print it, this once."""
    if role not in _ROLES:
        raise typer.BadParameter(f"{role!r} is none of {', '.join(_ROLES)}.", param_hint="--role")
    chosen: Role = "editor" if role == "editor" else "chat"
    with _keyring(options) as keyring:
        key, secret = keyring.create(name, chosen)
    if options.json:
        output.print_json({**key.as_dict(), "secret": secret})
        return
    output.say(f"{key.label}, a key of {key.name} for {_allowed(key.role)}. It will not be shown again: keep it now.")
    print(secret)


@keys.command("list")
@takes_options
def list_(options: Options) -> None:
    """List the keys, without what makes them keys."""
    with _keyring(options) as keyring:
        found = keyring.list()
    if options.json:
        output.print_json([key.as_dict() for key in found])
        return
    if not found:
        output.out().print("No keys yet: whoever reaches the server may do everything.")
        return
    shown = table("id", "name", "role", "begins", "made", "last used", "revoked")
    for key in found:
        moments = [_moment(at) for at in (key.created_at, key.last_used_at, key.revoked_at)]
        shown.add_row(Text(key.label, "bold"), Text(key.name), key.role, Text(f"{key.shown}…"), *moments)
    output.out().print(shown)


@keys.command()
@takes_options
def revoke(
    options: Options, name: Annotated[str, typer.Argument(metavar="NAME", help="Its name, or its id, such as k3.")]
) -> None:
    """Make a key useless. A running server knows within a second."""
    with _keyring(options) as keyring:
        key = keyring.revoke(name)
    if options.json:
        output.print_json(key.as_dict())
        return
    output.out().print(Text.assemble((key.label, "bold"), f" {key.name} is revoked."))


@contextmanager
def _keyring(options: Options) -> Iterator[Keyring]:
    from liveweight.server.keys import Keyring

    settings = options.settings()
    keyring = Keyring(settings.workspace, settings.database_url)
    try:
        yield keyring
    finally:
        keyring.close()


def _allowed(role: str) -> str:
    return "chatting and reading" if role == "chat" else "everything"


def _moment(at: datetime | None) -> str:
    return "" if at is None else f"{at.astimezone():%Y-%m-%d %H:%M}"
