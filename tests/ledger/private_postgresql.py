"""A PostgreSQL server of the tests' own: made in a temporary folder, reached by a socket in it, removed after."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DEBIAN = "/usr/lib/postgresql"


def programs() -> Path | None:
    """The folder that holds initdb and pg_ctl, the newest where there are several; None where there is none."""
    on_path = shutil.which("initdb")
    if on_path and shutil.which("pg_ctl"):
        return Path(on_path).resolve().parent
    found = [folder for folder in Path(_DEBIAN).glob("*/bin") if (folder / "initdb").exists()]
    return max(found, key=lambda folder: int(folder.parent.name), default=None)


def missing() -> str:
    """Why no server can be started here; empty where one can."""
    if programs() is None:
        return "PostgreSQL is not installed (initdb is not on the path, nor under /usr/lib/postgresql)"
    if os.geteuid() == 0 and (shutil.which("runuser") is None or _postgres_user() is None):
        return "PostgreSQL refuses to run as root, and there is no runuser or no user postgres to run it as"
    return ""


def _postgres_user() -> pwd.struct_passwd | None:
    return next((user for user in pwd.getpwall() if user.pw_name == "postgres"), None)


@contextmanager
def server() -> Iterator[str]:
    """A running server: gives the folder of its socket; the user is `liveweight`, without a password."""
    binaries = programs()
    assert binaries is not None
    folder = Path(tempfile.mkdtemp(prefix="liveweight-postgresql-"))
    before: list[str] = []
    user = _postgres_user()
    if os.geteuid() == 0 and user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
        before = ["runuser", "-u", user.pw_name, "--"]

    def call(*command: str) -> None:
        told = subprocess.run([*before, *command], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if told.returncode:
            raise RuntimeError(f"{command[0]} failed: {told.stdout}{told.stderr}")

    data = str(folder / "data")
    control = str(binaries / "pg_ctl")
    # The tests kill clients, never the server, so its own fsync would only cost time.
    settings = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=40 -c shared_buffers=16MB"
    try:
        call(str(binaries / "initdb"), "-D", data, "-U", "liveweight", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")
        call(control, "-D", data, "-w", "-l", str(folder / "log"), "-o", settings, "start")
        try:
            yield str(folder)
        finally:
            call(control, "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
