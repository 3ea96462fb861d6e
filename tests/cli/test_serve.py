"""`liveweight serve` as a process: where it may listen, that it answers, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.tiny_workspace import save_tiny_model, write_probes


def environment(root: Path) -> dict[str, str]:
    write_probes(root / "probes.jsonl")
    return os.environ | {
        "LIVEWEIGHT_MODEL": str(save_tiny_model(root / "model")),
        "LIVEWEIGHT_WORKSPACE": str(root / "workspace"),
        "LIVEWEIGHT_CACHE_DIR": str(root / "cache"),
        "LIVEWEIGHT_GUARD__PROBE_FILE": str(root / "probes.jsonl"),
        "OMP_NUM_THREADS": "1",
    }


def liveweight(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "liveweight", *words],
        env=environment(root), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@contextmanager
def serving(root: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address, which it tells on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "liveweight", "serve", "--port", "0", *words],
        env=environment(root), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if " at http://" in line:
                url = line.split(" at ")[1].split()[0]
                break
        else:
            raise AssertionError("it ended before it listened")
        assert httpx.get(f"{url}/healthz", timeout=60).json()["status"] == "ok"
        yield process, url
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_without_keys_it_listens_on_this_machine_only_and_with_one_anywhere(tmp_path: Path) -> None:
    refused = liveweight(tmp_path, "serve", "--host", "0.0.0.0", "--port", "0")
    assert refused.returncode == 2
    assert "Without keys" in refused.stderr and "keys create" in refused.stderr
    assert liveweight(tmp_path, "keys", "create", "me", "--role", "chat").returncode == 0
    with serving(tmp_path, "--host", "0.0.0.0") as (_, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401


def test_a_port_that_is_taken_is_told_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = liveweight(tmp_path, "serve", "--port", port)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr and "--port" in done.stderr


def test_it_serves_the_page_and_the_api_and_ends_cleanly_while_somebody_listens(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, url):
        page = httpx.get(url, follow_redirects=True, timeout=60)
        assert page.status_code == 200 and "text/html" in page.headers["content-type"]
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["liveweight"]["reply"]
        with httpx.stream("GET", f"{url}/v1/live/events", headers={"last-event-id": "0"}, timeout=60) as events:
            lines = events.iter_lines()
            assert next(line for line in lines if line.startswith("event: reply"))
            process.send_signal(signal.SIGTERM)
            list(lines)  # the stream ends, rather than keeping the server
        assert process.wait(60) == 0
    with serving(tmp_path, "--no-page") as (process, url):
        assert httpx.get(f"{url}/v1/live/replies/{reply}").status_code == 200
        assert httpx.get(url).status_code == 404
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.parametrize("settings", [{"LIVEWEIGHT_SERVER__PORT": "70000"}, {"LIVEWEIGHT_SERVER__PROT": "1"}])
def test_a_setting_that_cannot_be_is_named(
    tmp_path: Path, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    done = liveweight(tmp_path, "serve")
    assert done.returncode == 2
    assert next(iter(settings)) in done.stderr or "server.port" in done.stderr
