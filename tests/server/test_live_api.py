"""liveweight's own routes: feedback as jobs, changes and their switches, keys, limits, events."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Route
from starlette.testclient import TestClient

from liveweight.adjustments import Adjustment, op_from
from liveweight.server.app import create_app
from liveweight.server.logs import JsonLines
from liveweight.server.service import Service
from liveweight.settings import Settings
from tests.tiny_workspace import QUESTION, add_shout, tiny_settings

HERE = "http://127.0.0.1:8000"


@pytest.fixture(autouse=True)
def shouting() -> None:
    add_shout()


def settings(root: Path, **server: Any) -> Settings:
    return tiny_settings(root, server={"page": False, **server})


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service.open(settings(tmp_path)) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url=HERE) as client:
        yield client


def asked(client: httpx.Client, question: str = QUESTION, **more: Any) -> str:
    """A reply's id."""
    model = client.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": question}], **more}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["liveweight"]["reply"]
    return found


def judged(client: httpx.Client, reply: str, **request: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/live/replies/{reply}/feedback?wait=30", json=request)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_fix_is_a_job_whose_change_can_be_weakened_switched_and_undone(client: TestClient, service: Service) -> None:
    before = service.live.fingerprints()
    reply = asked(client)
    job = judged(client, reply, verdict="fix", wanted="z")
    assert job["status"] == "done"
    change = job["result"]["change"]["label"]
    assert client.get("/v1/live/status").json()["active"] == [change]
    assert client.get(f"/v1/live/replies/{reply}").json()["text"] != service.live.ask(QUESTION)
    half = client.put(f"/v1/live/changes/{change}/strength", json={"strength": 0.5}).json()
    assert (half["state"], half["strength"], half["label"]) == ("active", 0.5, change)
    assert client.post(f"/v1/live/changes/{change}/off").json()["state"] == "off"
    assert service.live.fingerprints() == before
    assert client.post(f"/v1/live/changes/{change}/off").status_code == 409
    assert client.post(f"/v1/live/changes/{change}/on").json()["state"] == "active"
    assert client.post(f"/v1/live/changes/{change}/undo").json()["state"] == "undone"
    assert service.live.fingerprints() == before
    assert [each["label"] for each in client.get("/v1/live/changes").json()] == [change]
    assert client.get("/v1/live/changes?state=active").json() == []


def test_a_preview_commits_nothing_and_a_good_reply_is_protected(client: TestClient, service: Service) -> None:
    before = service.live.fingerprints()
    reply = asked(client)
    job = judged(client, reply, verdict="bad", preview=True)
    assert job["result"]["change"]["state"] == "preview"
    assert service.live.fingerprints() == before
    assert client.get("/v1/live/changes").json() == []
    judged(client, reply, verdict="good", reason="as it should be")
    assert [each["label"] for each in client.get("/v1/live/protected").json()] == ["p1"]
    assert [each["verdict"] for each in client.get(f"/v1/live/replies/{reply}/feedback").json()] == ["good"]
    assert client.post("/v1/live/changes/p1/undo").json()["state"] == "undone"
    assert client.get("/v1/live/protected").json() == []
    assert client.post("/v1/live/changes/p1/undo").status_code == 409


def test_the_same_key_twice_is_one_job_and_another_request_under_it_is_refused(client: TestClient) -> None:
    reply, key = asked(client), {"Idempotency-Key": "once"}
    place = f"/v1/live/replies/{reply}/feedback?wait=30"
    first = client.post(place, json={"verdict": "fix", "wanted": "z"}, headers=key)
    again = client.post(place, json={"verdict": "fix", "wanted": "z"}, headers=key)
    assert first.json() == again.json()
    assert first.headers["location"] == f"/v1/live/jobs/{first.json()['id']}"
    assert len(client.get("/v1/live/changes").json()) == 1
    other = client.post(place, json={"verdict": "bad"}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


def test_a_job_that_fails_says_why_and_one_that_waits_can_be_cancelled(client: TestClient, service: Service) -> None:
    reply = asked(client)
    failed = judged(client, reply, verdict="fix", wanted="q")  # the one letter that the method cannot say
    assert (failed["status"], failed["error"]["code"], failed["error"]["status"]) == ("failed", "no_mend_found", 422)
    with service.live._whole():  # no job can change anything meanwhile
        running = client.post(f"/v1/live/replies/{reply}/feedback", json={"verdict": "bad"})
        waiting = client.post(f"/v1/live/replies/{reply}/feedback", json={"verdict": "bad", "reason": "again"})
        assert (running.status_code, waiting.status_code) == (202, 202)
        cancelled = client.post(f"/v1/live/jobs/{waiting.json()['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert client.get(f"/v1/live/jobs/{running.json()['id']}?wait=30").json()["status"] in ("done", "failed")
    assert [each["id"] for each in client.get("/v1/live/jobs?status=cancelled").json()] == [waiting.json()["id"]]


def test_a_switch_waits_no_longer_than_it_was_told_for_a_change_that_is_being_made(
    client: TestClient, service: Service
) -> None:
    change = judged(client, asked(client), verdict="fix", wanted="z")["result"]["change"]["label"]
    service.live.patience = 0.01
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with service.live._whole():
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    answer = client.post(f"/v1/live/changes/{change}/off")
    release.set()
    thread.join()
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "state_conflict")


def test_what_happened_can_be_read_compared_and_exported(client: TestClient, service: Service) -> None:
    judged(client, asked(client), verdict="fix", wanted="z", reason="it is")
    versions = client.get("/v1/live/versions").json()
    assert [each["event"] == 0 for each in versions] == [False, True]
    assert versions[0]["on"] == [{"change": "c1", "strength": 1.0}]
    body = {"prompt": QUESTION, "versions": [0, "now"]}
    base, now = client.post("/v1/live/compare", json=body).json()["answers"]
    assert now["text"].startswith("z")
    assert base["text"] != now["text"]
    assert client.post("/v1/live/compare", json=body | {"versions": [10**6]}).status_code == 400
    lines = [json.loads(line) for line in client.get("/v1/live/feedback/export").text.splitlines()]
    assert [(line["prompt"], line["correction"], line["reason"]) for line in lines] == [(QUESTION, "z", "it is")]
    history = client.get("/v1/live/history").json()
    assert {each["made_by"] for each in history if each["kind"] in ("active", "feedback")} == {"local"}
    assert client.get("/v1/live/changes/c1").json()["made_by"] == "local"
    assert client.get(f"/v1/live/history?after={history[-1]['id']}").json() == []


def test_what_was_exported_can_be_learnt(client: TestClient) -> None:
    body = {"lessons": [{"prompt": QUESTION, "correction": "z"}]}
    job = client.post("/v1/live/learn?wait=30", json=body).json()
    assert job["status"] == "done", job
    assert [each["outcome"] for each in job["result"]["lessons"]["items"]] == ["learnt"]


def test_neurons_can_be_held_looked_at_and_found(client: TestClient, service: Service) -> None:
    before = service.live.fingerprints()
    looked = client.post("/v1/live/neuron?wait=30", json={"neuron": "0:1", "text": "the cat sat on the mat " * 4})
    assert looked.json()["status"] == "done", looked.json()
    found = client.post("/v1/live/neurons?wait=30", json={"find": "a"})
    assert found.json()["status"] == "done", found.json()
    body = {"values": "0:1=3", "prompt": QUESTION, "max_tokens": 3}
    assert "change" not in client.post("/v1/live/clamp?wait=30", json=body).json()["result"]
    assert service.live.fingerprints() == before
    kept = client.post("/v1/live/clamp?wait=30", json=body | {"keep": True}).json()
    assert kept["result"]["change"]["state"] == "active"
    measured = client.post("/v1/live/guard?wait=30").json()
    assert measured["result"]["guard"]["items"] > 0


def test_an_adjustment_made_elsewhere_is_a_change_like_any_other(client: TestClient, service: Service) -> None:
    before = service.live.fingerprints()
    op = {"kind": "scale_neurons", "layer": 0, "neurons": [1, 2], "factors": [0.3, 0.1]}
    body = {"adjustment": {"name": "quieter", "ops": [op]}, "prompt": QUESTION, "force": True}
    looked = client.post("/v1/live/changes?wait=30", json=body | {"preview": True}).json()
    assert looked["result"]["change"]["state"] == "preview"
    assert service.live.fingerprints() == before
    change = client.post("/v1/live/changes?wait=30", json=body).json()["result"]["change"]
    assert (change["state"], change["name"], change["method"]) == ("active", "quieter", "given")
    adjustment = Adjustment(name="quieter", method="given", ops=(op_from(op),))
    assert change["adjustment_hash"] == adjustment.hash  # the numbers came through JSON and the jobs' table as they are
    assert service.live.fingerprints() != before
    assert client.post("/v1/live/undo").json()["state"] == "undone"
    assert service.live.fingerprints() == before


@pytest.mark.parametrize(
    "op",
    [
        {"kind": "scale_neurons", "layer": 0, "neurons": [1], "factors": [1, 2]},
        {"kind": "scale_neurons", "layer": 0, "neurons": [1], "factors": [10**400]},
        {"kind": "low_rank", "site": "layers.0.mlp.down.weight", "left": [[1], [1, 2]], "right": [[1]]},
        {"kind": "melt", "layer": 0},
        {"layer": 0},
    ],
)
def test_ops_that_are_none_are_refused_before_they_are_a_job(client: TestClient, op: dict[str, Any]) -> None:
    body = {"adjustment": {"name": "strange", "ops": [op]}}
    assert client.post("/v1/live/changes", json=body).status_code == 400
    assert client.get("/v1/live/jobs").json() == []


def test_ops_that_do_not_fit_the_model_fail_with_a_reason(client: TestClient) -> None:
    op = {"kind": "scale_neurons", "layer": 99, "neurons": [1], "factors": [0]}
    job = client.post("/v1/live/changes?wait=30", json={"adjustment": {"name": "far", "ops": [op]}}).json()
    assert job["status"] == "failed"
    assert "99" in job["error"]["message"]


def test_why_names_the_neurons_of_a_reply(client: TestClient) -> None:
    answer = client.post(f"/v1/live/replies/{asked(client)}/why", json={"top": 3})
    assert answer.status_code == 200, answer.text


def test_the_server_counts_what_it_did_without_naming_anybody(client: TestClient) -> None:
    asked(client)
    client.get("/v1/live/changes/c77")
    text = client.get("/metrics").text
    assert re.search(r"liveweight_tokens_generated_total [1-9]", text)
    assert 'route="/v1/live/changes/{change}",status="404"' in text
    assert "c77" not in text
    assert re.search(r'liveweight_changes\{state="active"\} 0', text)


def test_every_answer_has_the_id_of_its_request(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = client.get("/healthz", headers={"x-request-id": "no good\u00e9".encode()}).headers["x-request-id"]
    assert made.startswith("req-")
    assert client.get("/nowhere").headers["x-request-id"].startswith("req-")


def paths(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path that the application answers, with something in place of each id."""
    found = []
    for path, methods in app.openapi()["paths"].items():
        found += [(method.upper(), re.sub(r"\{[^}]*\}", "x1", path)) for method in methods]
    found += [("GET", route.path) for route in app.routes if isinstance(route, Route)]
    return sorted(set(found))


def test_once_there_is_a_key_nothing_but_the_health_answers_without_one(client: TestClient, service: Service) -> None:
    service.keys.create("alice", "editor")
    for method, path in paths(client.app):  # type: ignore[arg-type] # it is the one that was made
        answer = client.request(method, path, json={} if method in ("POST", "PUT") else None)
        assert answer.status_code == (200 if path == "/healthz" else 401), (method, path, answer.status_code)
        if path != "/healthz":
            assert answer.json()["error"]["code"] == "unauthorized"
            assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_chat_key_talks_and_reads_and_an_editor_key_changes_under_its_name(
    client: TestClient, service: Service
) -> None:
    _, talks = service.keys.create("bob", "chat")
    _, edits = service.keys.create("alice", "editor")
    bob, alice = ({"authorization": f"Bearer {secret}"} for secret in (talks, edits))
    client.headers.update(bob)
    assert client.get("/v1/live/changes").json() == []
    reply = asked(client)
    place = f"/v1/live/replies/{reply}/feedback?wait=30"
    refused = client.post(place, json={"verdict": "bad"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert client.get("/v1/live/status").json()["role"] == "chat"
    job = client.post(place, json={"verdict": "fix", "wanted": "z"}, headers=alice).json()
    assert job["author"] == "key:alice"
    assert client.get("/v1/live/changes/c1").json()["made_by"] == "key:alice"
    assert client.post("/v1/live/changes/c1/off").status_code == 403
    service.keys.revoke("bob")
    assert client.get("/v1/live/status").status_code == 401


def test_a_page_of_another_origin_and_a_foreign_name_for_this_machine_are_refused(client: TestClient) -> None:
    assert client.post("/v1/live/undo", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post("/v1/live/undo", headers={"origin": HERE}).status_code == 409  # there is nothing to undo
    assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 403
    assert "access-control-allow-origin" not in client.get("/healthz", headers={"origin": HERE}).headers


def test_origins_that_are_allowed_get_their_headers(tmp_path: Path) -> None:
    with Service.open(settings(tmp_path, origins=("https://page.example",))) as service:
        client = TestClient(create_app(service), base_url=HERE)
        asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
        answer = client.options("/v1/live/undo", headers=asks)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert client.post("/v1/live/undo", headers={"origin": "https://page.example"}).status_code == 409


def test_what_is_too_large_or_too_often_is_refused(tmp_path: Path) -> None:
    with Service.open(settings(tmp_path, max_body_bytes=2048, requests_per_minute=5)) as service:
        client = TestClient(create_app(service), base_url=HERE)
        large = client.post("/v1/chat/completions", content=b" " * 3000)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")

        def piece() -> Iterator[bytes]:
            yield from (b" " * 1000 for _ in range(4))

        assert client.post("/v1/chat/completions", content=piece()).status_code == 413
        statuses = [client.get("/v1/live/status").status_code for _ in range(6)]
        assert statuses == [200] * 5 + [429]
        assert int(client.get("/v1/live/status").headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("path", ["c0", "c9999999999999999999999", "..%2f..%2fetc%2fpasswd", "%00", "%ff", "c1;drop"])
def test_an_id_that_is_none_is_a_plain_refusal(client: TestClient, path: str) -> None:
    answer = client.get(f"/v1/live/changes/{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


def test_events_come_as_they_are_committed_and_go_on_where_a_listener_left_off(service: Service) -> None:
    asyncio.run(_listened(service))


async def _listened(service: Service) -> None:
    seen = []
    feed = service.events.subscribe(after=0)
    async for event in feed:
        seen.append(event)
        break
    await feed.aclose()  # type: ignore[attr-defined] # it is a generator
    service.live.ledger.add_reply(
        service.live.engine.info.hash, [], "said", token_ids=[1], prompt_token_ids=[1], version_number=0,
        version_hash="0" * 64,
    )  # fmt: skip
    async for event in service.events.subscribe(after=seen[-1].id):
        seen.append(event)
        if event.kind == "reply":
            break
    assert [event.id for event in seen] == sorted({event.id for event in seen})


def test_feedback_may_be_given_to_a_completions_own_id(client: TestClient) -> None:
    model = client.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}]}
    completion = client.post("/v1/chat/completions", json=body).json()["id"]
    assert judged(client, completion, verdict="bad", preview=True)["status"] == "done"
    assert client.get(f"/v1/live/replies/{completion}").json()["public_id"] == completion


@pytest.mark.parametrize("prompts", [False, True])
def test_logs_hold_what_is_said_only_where_that_was_asked_for(prompts: bool) -> None:
    secret = " ".join(("a", "secret", "prompt"))  # as it stands in no line of code that a trace would show
    try:
        raise ValueError(secret)
    except ValueError:
        told = logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info(), "said": secret})
    line = JsonLines(prompts=prompts).format(told)
    assert json.loads(line)["error"] == "ValueError"
    assert "test_live_api" in json.loads(line)["trace"]
    assert (secret in line) is prompts
