"""Who may do what: keys, roles, and how often.

Owns the dependencies that routes name (`chatter`, `editor`), and the rule for a server without keys: it listens on this
machine only, and whoever reaches it may do everything. Knows nothing of how keys are stored.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from liveweight.errors import Forbidden, InvalidInput, Unauthorized
from liveweight.ledger import ApiKey
from liveweight.server.service import Service

Role = Literal["chat", "editor"]

_bearer = HTTPBearer(
    auto_error=False, description="A key made with `liveweight keys create`; a chat key may talk, an editor key change."
)


@dataclass(frozen=True)
class Author:
    """Who calls: what the ledger writes down, and what they may do."""

    name: str
    role: Role

    @property
    def edits(self) -> bool:
        """Whether they may change the model."""
        return self.role == "editor"


LOCAL = Author("local", "editor")  # whoever reaches a server that has no keys


def service_of(request: Request) -> Service:
    """The service of the application that serves a request."""
    found = request.app.state.service
    assert isinstance(found, Service)
    return found


def author_of(service: Service, secret: str | None) -> Author:
    """Who holds a key. Raises Unauthorized where keys exist and this is none of them."""
    if not service.keys.any():
        return LOCAL
    key = None if secret is None else service.keys.find(secret)
    if key is None:
        raise Unauthorized(
            "No key was sent." if secret is None else "The key that was sent is unknown or was revoked.",
            hint="Send `Authorization: Bearer KEY`, with a key made by `liveweight keys create`.",
        )
    return holder_of(key)


def holder_of(key: ApiKey) -> Author:
    """Who holds a key, as the ledger names them."""
    return Author(f"key:{key.name}", key.role)


async def chatter(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None
) -> Author:
    """Anybody with a key. Raises Unauthorized, RateLimited."""
    service = service_of(request)
    secret = None if credentials is None else credentials.credentials
    # The keys are read from the database once a second: not in the event loop, and not behind slow routes.
    author = await to_thread.run_sync(author_of, service, secret, limiter=service.door)
    caller = author.name if author is not LOCAL else (request.client.host if request.client else "")
    service.rates.take(caller)
    request.state.author = author
    return author


def editor(author: Annotated[Author, Depends(chatter)]) -> Author:
    """Somebody with an editor's key. Raises Forbidden for a chat key."""
    if not author.edits:
        raise Forbidden("This key may chat, not change the model.", hint="Use a key made with `--role editor`.")
    return author


def require_safe_address(host: str, *, keys: bool) -> None:
    """Raises InvalidInput for an address that others can reach while nobody needs a key."""
    if keys or is_loopback(host):
        return
    raise InvalidInput(
        f"Without keys the server may not listen on {host}, where other machines could change the model.",
        hint="Make one with `liveweight keys create NAME --role editor`, or listen on 127.0.0.1.",
    )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
