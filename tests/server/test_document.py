"""The OpenAPI document: every route described, its examples run, and the server as it says, by schemathesis."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from liveweight.server.app import create_app
from liveweight.server.service import Service
from tests.server.serving import serving
from tests.tiny_workspace import QUESTION, add_shout, tiny_settings

_METHODS = ("get", "post", "put", "delete", "patch")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    add_shout()
    root = tmp_path_factory.mktemp("document")
    with Service.open(tiny_settings(root, server={"page": False, "requests_per_minute": 10**6})) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url="http://127.0.0.1:8000") as client:
        yield client


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method in _METHODS:
            if method in methods:
                yield path, method, methods[method]


def test_every_route_says_what_it_does_what_it_takes_and_what_it_may_answer(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for path, method, told in operations(document):
        where = f"{method.upper()} {path}"
        assert told.get("description") or told.get("summary"), where
        assert any(status.startswith("2") for status in told["responses"]), where
        assert all(each.get("description") for each in told["responses"].values()), where
        if path != "/healthz":
            assert {"401", "429"} <= set(told["responses"]), where
            assert told.get("security"), where
        assert all("schema" in each for each in told.get("parameters", [])), where


def test_every_example_of_a_body_is_accepted(client: TestClient, service: Service) -> None:
    document = client.get("/openapi.json").json()
    model = client.get("/v1/models").json()["data"][0]["id"]
    asked = client.post(
        "/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": QUESTION}]}
    ).json()
    place = f"/v1/live/replies/{asked['liveweight']['reply']}/feedback?wait=30"
    assert client.post(place, json={"verdict": "fix", "wanted": "z"}).json()["status"] == "done"
    ran = 0
    for path, method, told in operations(document):
        content = told.get("requestBody", {}).get("content", {}).get("application/json", {})
        for name, example in content.get("examples", {}).items():
            body = example["value"] | ({"model": model} if "model" in example["value"] else {})
            # Seconds of waiting end a job before the next example, whose state it would otherwise decide.
            filled = path.format(reply="r1", change="c1", job="j1")
            answer = client.request(
                method, filled, params={"wait": 30} if "202" in told["responses"] else {}, json=body
            )
            assert answer.status_code < 500, (path, name, answer.text)
            if path.endswith("/on"):  # it is on already
                assert answer.status_code == 409, (path, name, answer.text)
            else:
                assert answer.status_code in (200, 202), (path, name, answer.text)
            ran += 1
    assert ran >= 11


def test_schemathesis_finds_nothing_that_the_document_does_not_say(tmp_path: Path) -> None:
    add_shout()
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
        "response_schema_conformance"
    )
    with serving(tmp_path) as served:
        words = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            f"{served.url}/openapi.json",
            "--no-color",
            "--checks",
            checks,
        ]
        # A stream of events never ends; it has a test of its own.
        words += ["--exclude-path", "/v1/live/events", "--phases", "examples,coverage", "-n", "3"]
        words += ["--request-timeout", "60", "--seed", "1"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
