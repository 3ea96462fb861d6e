"""Who looks at the page, and what they may do.

Owns the login page, the signed cookie that names a key, and the rights that a visitor has. Where no keys exist the
server is on loopback, and whoever reaches it may do everything. Knows nothing of how keys are kept.
"""

from __future__ import annotations

import html
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from itsdangerous import BadSignature, URLSafeTimedSerializer

from liveweight.engines.fingerprints import write_atomically
from liveweight.errors import LiveweightError, Unauthorized
from liveweight.server.access import LOCAL, holder_of
from liveweight.web.parts import aside

if TYPE_CHECKING:
    from liveweight.server.service import Service

COOKIE = "liveweight-page"
_DAYS = 30
_SECRET = 32  # bytes of the secret that cookies are signed with; as text it is longer
_FILES = Path(__file__).parent


@dataclass(frozen=True)
class Visitor:
    """Somebody who may look."""

    author: str  # as the ledger writes it
    name: str  # of the key; empty where there are none
    may_change: bool
    key: int | None = None


_NOBODY = Visitor(LOCAL.name, "", may_change=True)  # where there are no keys


class Visitors:
    """Tells who a request or an open page belongs to."""

    def __init__(self, service: Service) -> None:
        """The secret that cookies are signed with is made once a workspace, readable by its owner alone."""
        self._keys = service.keys
        self._signer = URLSafeTimedSerializer(page_secret(service.settings.workspace), salt="liveweight page")

    async def of(self, request: Request) -> Visitor | None:
        """Who asks, or None where they have to give a key first."""
        found: Visitor | None = await aside(self._of, request.cookies.get(COOKIE, ""))
        return found

    def _of(self, cookie: str) -> Visitor | None:
        try:
            number = int(self._signer.loads(cookie, max_age=_DAYS * 86400))
        except (BadSignature, ValueError, TypeError):
            number = None
        return self.again(number)

    def again(self, number: int | None) -> Visitor | None:
        """The visitor with that key as it is now: None once it was revoked. Blocks."""
        if not self._keys.any():
            return _NOBODY
        key = next((key for key in self._keys.list() if key.id == number and key.revoked_at is None), None)
        return None if key is None else Visitor(holder_of(key).name, key.name, key.may_edit, key.id)

    def cookie_for(self, secret: str) -> str:
        """The cookie of whoever holds this key. Raises Unauthorized for one that is unknown or was revoked. Blocks."""
        key = self._keys.find(secret)
        if key is None:
            raise Unauthorized("That key is unknown or was revoked.", hint="Paste it whole; it begins with lw-.")
        return str(self._signer.dumps(key.id))

    def router(self) -> APIRouter:
        """The pages to sign in and out, plain HTML without any script."""
        router = APIRouter(include_in_schema=False)

        @router.get("/login")
        async def login(request: Request, to: str = "/") -> Response:
            if await self.of(request) is not None:
                return RedirectResponse(inside(to), status_code=303)
            return _form(to)

        @router.post("/login")
        async def sign_in(request: Request, key: Annotated[str, Form(max_length=500)], to: str = "/") -> Response:
            try:
                cookie = await aside(self.cookie_for, key.strip())
            except LiveweightError as error:
                return _form(to, error)
            answer = RedirectResponse(inside(to), status_code=303)
            answer.set_cookie(
                COOKIE,
                cookie,
                max_age=_DAYS * 86400,
                httponly=True,
                samesite="lax",
                secure=request.url.scheme == "https",
            )
            return answer

        @router.post("/logout")
        async def sign_out() -> Response:
            answer = RedirectResponse("/login", status_code=303)
            answer.delete_cookie(COOKIE)
            return answer

        return router


def login_address(request: Request) -> str:
    """Where to sign in, coming back to what was asked for."""
    query = f"?{request.url.query}" if request.url.query else ""
    return f"/login?to={quote(request.url.path + query, safe='')}"


def inside(to: str) -> str:
    """An address of this server, never another's."""
    return to if to.startswith("/") and not to.startswith(("//", "/\\")) else "/"


def _form(to: str, error: LiveweightError | None = None) -> HTMLResponse:
    said = ""
    if error is not None:
        said = f'<div class="problem" role="alert"><p class="strong">{html.escape(error.message)}</p>'
        said += f"<p>{html.escape(error.hint)}</p></div>"
    page = (_FILES / "login.html").read_text(encoding="utf-8")
    page = page.replace("{style}", (_FILES / "page.css").read_text(encoding="utf-8"))
    page = page.replace("{error}", said).replace("{to}", html.escape(quote(inside(to), safe=""), quote=True))
    return HTMLResponse(page, status_code=200 if error is None else error.http_status)


def page_secret(workspace: Path) -> str:
    """The workspace's secret, made at the first call, and anew where the file was cut short."""
    path = workspace / "page-secret"
    try:
        known = path.read_text(encoding="ascii")
    except (FileNotFoundError, UnicodeDecodeError):
        known = ""
    if len(known) >= _SECRET:
        return known
    made = secrets.token_urlsafe(_SECRET)
    write_atomically(path, made)  # readable by its owner alone
    return made
