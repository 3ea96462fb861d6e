"""Keys to the server: made, shown once, recognised, revoked.

Owns how a key looks and how one is recognised. Knows nothing of HTTP; what a role may do is for routes to ask of it.

A key is 256 random bits. What is kept of it is its sha256: a slow hash protects words that somebody can guess, and
nobody goes through 2^256 keys, however fast each try is. A fast one costs a request nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

from liveweight.errors import InvalidInput, LiveweightError
from liveweight.ledger import ApiKey, Role
from liveweight.ledger.key_table import KeyTable

Known = Sequence[tuple[bytes, ApiKey]]  # the hash of each secret, and its key

_LOG = logging.getLogger(__name__)
_BYTES = 32
_SHOWN = 12  # characters of a key that lists show
_FRESH = 1.0  # seconds after which what another process did is seen
_FRESH_FOR_NEW = 0.05  # the same where a key is unknown: it may have just been made
_USE_NOTED = timedelta(minutes=1)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._@-]{0,63}", re.ASCII)
_ID = re.compile(r"k?([0-9]{1,9})", re.ASCII | re.IGNORECASE)


class Keyring:
    """The keys of one workspace; close it in the end. Works beside any process that has the workspace open.

    Safe to use from several threads. `find` reads the database at most once a second, and writes once a minute a key:
    both take a moment, so call it where a moment may pass.
    """

    def __init__(self, workspace: Path, url: str | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Reach the keys of a workspace. Raises what `Ledger.open` raises; `clock` gives seconds."""
        self._table = KeyTable(workspace, url)
        self._clock = clock
        self._mutex = threading.Lock()
        self._known: Known = ()
        self._read_at: float | None = None
        self._noted: dict[int, datetime] = {}  # uses that were written down from here

    def close(self) -> None:
        """Let go of the database. Closing twice does no harm."""
        self._table.close()

    def create(self, name: str, role: Role) -> tuple[ApiKey, str]:
        """A new key and its secret, which is kept nowhere: show it now.

        Raises InvalidInput for a name that is none or was used already, and for another role.
        """
        if role not in get_args(Role):
            raise InvalidInput(f"{role!r} is not a role.", hint=f"Use {' or '.join(get_args(Role))}.")
        if _NAME.fullmatch(name) is None or _ID.fullmatch(name):
            raise InvalidInput(
                f"{name[:80]!r} cannot be the name of a key.",
                hint="Use a letter, then at most 63 letters, digits, dots, hyphens, underscores or @; not such as k3.",
            )
        secret = f"lw-{'edit' if role == 'editor' else 'chat'}-{secrets.token_urlsafe(_BYTES)}"
        key = self._table.add(name, role, _digest(secret).hex(), secret[:_SHOWN])
        self._forget()
        return key, secret

    def list(self) -> Sequence[ApiKey]:
        """Every key, oldest first; the revoked ones too."""
        return [key for _, key in self._table.all()]

    def revoke(self, key: str | int) -> ApiKey:
        """Make a key useless: its name, its id, or "k3". Raises InvalidInput for one that is not there."""
        written = str(key).strip()
        number = _ID.fullmatch(written)
        keys = self.list()
        found = next((each for each in keys if each.name == written or (number and each.id == int(number[1]))), None)
        if found is None:
            hint = f"There are {', '.join(each.name for each in keys)}." if keys else "There is no key yet."
            raise InvalidInput(f"There is no key {written[:80]!r}.", hint=hint)
        revoked = self._table.revoke(found.id)
        self._forget()
        return revoked

    def find(self, secret: str) -> ApiKey | None:
        """The key in force whose secret this is. How long it takes says nothing of how much of it was right.

        A revocation counts at once where it was made by this keyring, and within a second where by another process.
        """
        wanted = _digest(secret)
        found = _among(self._keys(_FRESH), wanted) or _among(self._keys(_FRESH_FOR_NEW), wanted)
        if found is not None:
            self._note_use(found)
        return found

    def any(self) -> bool:
        """Whether a key was ever made; when all are revoked nobody gets in, rather than everybody."""
        return bool(self._keys(_FRESH) or self._keys(_FRESH_FOR_NEW))

    def _keys(self, fresh: float) -> Known:
        """The keys as they were at most `fresh` seconds ago."""
        with self._mutex:
            now = self._clock()
            if self._read_at is None or now - self._read_at > fresh:
                self._known = tuple((bytes.fromhex(written), key) for written, key in self._table.all())
                self._read_at = now
            return self._known

    def _forget(self) -> None:
        with self._mutex:
            self._read_at = None

    def _note_use(self, key: ApiKey) -> None:
        """Write down, once a minute, that a key was used; where that fails nobody is kept waiting for it."""
        now = datetime.now(UTC)
        with self._mutex:
            last = max((at for at in (self._noted.get(key.id), key.last_used_at) if at is not None), default=None)
            if last is not None and now - last < _USE_NOTED:
                return
            self._noted[key.id] = now
        try:
            self._table.used(key.id, now)
        except LiveweightError as error:
            _LOG.warning("The use of %s was not written down: %s", key.label, error.message)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()


def _among(keys: Known, wanted: bytes) -> ApiKey | None:
    """The key in force with that hash. Every one is compared to the end, whichever it is."""
    found: ApiKey | None = None
    for digest, key in keys:
        if hmac.compare_digest(digest, wanted) and key.revoked_at is None:
            found = key
    return found
