"""The server under load: what docs/benchmarks.md says of `liveweight serve`.

    python benchmarks/server.py --json server.json [--only overhead,batch,load,identical,kill,bad] [--model smollm2]

Each part starts a real server process on loopback in a workspace of its own, and talks to it as clients do. Parts:

overhead   one chat over the API against the engine called directly, in turns: time to first token, time a token
batch      tokens a second of 8 chats at once, over those of one
load       16 clients chat for some minutes while changes commit and are undone; every token is checked afterwards
           against the weights that its reply names
identical  replies before any change and after 100 changes were made and undone, byte for byte
kill       `kill -9` at random instants under that load; nothing acknowledged may be lost
bad        bad inputs and slow connections
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

QUESTIONS = [
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "Name three fruits.",
    "Why is the sky blue?",
    "What is two plus three?",
    "Tell me about horses.",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
    "What is a neuron?",
    "Say hello in Spanish.",
    "What is the largest ocean?",
    "Give me a riddle.",
    "What does a baker do?",
    "Name a river in Africa.",
    "What is snow made of?",
    "Tell me a short joke.",
]
SHORT = "Answer with one word. What is the capital of France?"  # what the reports of the changes ask
PARTS = ("overhead", "batch", "load", "identical", "kill", "bad")


class Reached:
    """A server that can be asked."""

    url = ""

    def client(self) -> httpx.Client:
        """A client of it."""
        return httpx.Client(base_url=self.url, timeout=httpx.Timeout(120))


class Served(Reached):
    """A server process."""

    def __init__(self, workspace: Path, model: str, threads: int | None, *, probes: int = 0, **server: Any) -> None:
        self.probes = probes
        self.workspace, self.model, self.threads, self.server = workspace, model, threads, server
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Begin, and return the seconds until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        settings = {"requests_per_minute": 1_000_000, **self.server}
        environment = {f"LIVEWEIGHT_SERVER__{name.upper()}": str(value) for name, value in settings.items()}
        if self.probes:
            environment["LIVEWEIGHT_GUARD__PROBE_FILE"] = str(few_probes(self.workspace.parent, self.probes))
        words = [sys.executable, "-m", "liveweight", "serve", "--port", str(port)]
        words += ["--workspace", str(self.workspace), "--model", self.model]
        words += [] if self.threads is None else ["--threads", str(self.threads)]
        begun = time.monotonic()
        log = (self.workspace.parent / f"{self.workspace.name}.log").open("ab")
        self.process = subprocess.Popen(words, env=os.environ | environment, stdout=log, stderr=log)
        while True:
            try:
                if httpx.get(f"{self.url}/healthz", timeout=2).status_code == 200:
                    return time.monotonic() - begun
            except httpx.HTTPError:
                pass
            if self.process.poll() is not None:
                raise SystemExit(f"The server ended with {self.process.returncode}; see {log.name}.")
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """End it as a person would; its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def served(folder: Path, model: str, threads: int | None, *, probes: int = 0, **server: Any) -> Iterator[Served]:
    found = Served(folder, model, threads, probes=probes, **server)
    found.start()
    try:
        yield found
    finally:
        found.stop()


class Inside(Reached):
    """A server in this process, whose weights can be looked at."""

    def __init__(self, service: Any, url: str) -> None:
        self.service, self.url = service, url


@contextmanager
def inside(args: argparse.Namespace, folder: Path, *, probes: int) -> Iterator[Inside]:
    import uvicorn

    from liveweight.server.app import create_app
    from liveweight.server.limits import PatientProtocol
    from liveweight.server.service import Service
    from liveweight.settings import Settings

    settings = Settings(
        model=args.model,
        workspace=folder,
        threads=args.threads,
        server={"page": False, "requests_per_minute": 10**6},
        guard={"probe_file": few_probes(folder.parent, probes)} if probes else {},
    )
    with Service.open(settings) as service, socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(create_app(service), http=PatientProtocol, log_config=None, access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Inside(service, f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()


def few_probes(folder: Path, count: int) -> Path:
    """A guard of few probes, so that many changes fit into the minutes that clients chat."""
    file = folder / "probes.jsonl"
    file.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS[:count]))
    return file


def chat(client: httpx.Client, question: str, tokens: int = 24, **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, **more}
    answer = client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


MODEL = "smollm2"


# ------------------------------------------------------------------------------------------------- the parts


def overhead(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One chat over the API against the engine's own iterator, in turns, in one process."""
    from liveweight.engines.base import Message, Sampling

    direct: list[list[float]] = []
    through: list[list[float]] = []
    with inside(args, folder, probes=0) as server, server.client() as client:
        for turn in range(args.rounds + 1):
            marks = [time.perf_counter()]
            question = QUESTIONS[turn % len(QUESTIONS)]
            engine = server.service.live.engine
            for _ in engine.generate([Message("user", question)], Sampling(max_tokens=args.tokens)):
                marks.append(time.perf_counter())
            direct.append(marks)
            marks = [time.perf_counter()]
            body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "stream": True}
            with client.stream(
                "POST", "/v1/chat/completions", json={**body, "max_tokens": args.tokens, "temperature": 0}
            ) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {") and '"content"' in line:
                        marks.append(time.perf_counter())
            through.append(marks)
    first = [1000 * (b[1] - b[0] - (a[1] - a[0])) for a, b in zip(direct[1:], through[1:], strict=True)]
    per = [
        [(marks[-1] - marks[1]) / max(1, len(marks) - 2) for marks in runs[1:] if len(marks) > 8]
        for runs in (direct, through)
    ]
    return {
        "first_token_ms": statistics.median(first),
        "engine_ms_a_token": 1000 * statistics.median(per[0]),
        "api_ms_a_token": 1000 * statistics.median(per[1]),
        "token_ratio": statistics.median(b / a for a, b in zip(*per, strict=False)),
        "rounds": args.rounds,
    }


def batch(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens a second of 8 chats at once over those of one, in turns."""
    one: list[float] = []
    many: list[float] = []
    with served(folder, args.model, args.threads) as server, server.client() as client:
        chat(client, QUESTIONS[0])
        for turn in range(max(3, args.rounds // 3)):
            for count, into in ((1, one), (8, many)):
                asked = [QUESTIONS[(turn + index) % len(QUESTIONS)] for index in range(count)]
                begun = time.perf_counter()
                with ThreadPoolExecutor(count) as pool:
                    said = list(pool.map(lambda question: chat(client, question, 64), asked))
                tokens = sum(each["usage"]["completion_tokens"] for each in said)
                into.append(tokens / (time.perf_counter() - begun))
    return {
        "one_tokens_per_second": statistics.median(one),
        "eight_tokens_per_second": statistics.median(many),
        "ratio": statistics.median(b / a for a, b in zip(one, many, strict=True)),
    }


def weight_change(number: int, layers: int, neurons: int) -> dict[str, Any]:
    """An adjustment that rewrites weights: what some neurons of one layer write or read, another for every number."""
    draw = random.Random(number)
    chosen = draw.sample(range(neurons), 8)
    factors = [draw.uniform(0.5, 1.5) for _ in chosen]
    side = "read" if number % 2 else "write"
    op = {"kind": "scale_neurons", "layer": draw.randrange(layers), "neurons": chosen, "factors": factors, "side": side}
    return {"adjustment": {"name": f"change {number}", "ops": [op]}, "prompt": SHORT, "force": True}


def ended(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """A job when it is over; what is no job as it is."""
    while job.get("status") in ("queued", "running"):
        job = client.get(f"/v1/live/jobs/{job['id']}?wait=60").json()
    return job


class Switcher:
    """Commits changes and takes them back, one after another, for as long as the others chat."""

    def __init__(self, server: Reached, count: int, *, keep: int = 0) -> None:
        self.server, self.count, self.keep = server, count, keep  # of the last ones, `keep` stay on
        self.statuses: Counter[str] = Counter()
        self.errors: list[Any] = []
        self.commits: list[float] = []  # seconds
        self.undos: list[float] = []
        self.seconds = 0.0

    def run(self, done: threading.Event | None = None) -> None:
        """Until all are made, or `done` says that nobody chats any more."""
        begun = time.monotonic()
        with self.server.client() as client:
            status = client.get("/v1/live/status").json()
            for number in range(self.count):
                if done is not None and done.is_set():
                    return
                change = self._commit(client, number, weight_change(number, status["layers"], status["neurons"]))
                if change is not None and number < self.count - self.keep:
                    start = time.monotonic()
                    answer = client.post(f"/v1/live/changes/{change}/undo")
                    self.statuses[str(answer.status_code)] += 1
                    self.undos.append(time.monotonic() - start)
        self.seconds = time.monotonic() - begun

    def _commit(self, client: httpx.Client, number: int, body: dict[str, Any]) -> str | None:
        start = time.monotonic()
        answer = client.post("/v1/live/changes?wait=60", json=body, headers={"idempotency-key": f"k{number}"})
        self.statuses[str(answer.status_code)] += 1
        job = ended(client, answer.json())
        if job.get("status") != "done":
            self.errors.append(job.get("error"))
            return None
        self.commits.append(time.monotonic() - start)
        return str(job["result"]["change"]["label"])

    def told(self) -> dict[str, Any]:
        """As the results say it."""
        return {
            "changes_committed": len(self.commits),
            "changes_undone": len(self.undos),
            "change_errors": self.errors[:5],
            "change_statuses": dict(self.statuses),
            "changing_seconds": self.seconds,
            "commit_seconds_median": statistics.median(self.commits or [0]),
            "undo_seconds_median": statistics.median(self.undos or [0]),
            "undo_seconds_worst": max(self.undos or [0]),
        }


def load(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """16 clients chat while changes commit and are undone; the last three stay on."""
    from liveweight import LiveModel

    done = threading.Event()
    errors: list[str] = []
    counted: Counter[str] = Counter()
    with inside(args, folder, probes=args.probes) as server:
        base = server.service.live.fingerprints()

        def client_of(number: int) -> None:
            draw = random.Random(number)
            with server.client() as client:
                while not done.is_set():
                    try:
                        answer = chat(client, draw.choice(QUESTIONS), 24, temperature=0)
                    except httpx.HTTPError as error:
                        errors.append(repr(error))
                        continue
                    counted["replies"] += 1
                    counted["tokens"] += answer["usage"]["completion_tokens"]
                    counted["spanning"] += answer["liveweight"]["spans_versions"]

        switcher = Switcher(server, args.changes, keep=3)
        threads = [threading.Thread(target=client_of, args=(number,)) for number in range(16)]
        threads.append(threading.Thread(target=switcher.run, args=(done,)))
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        end = begun + args.minutes * 60
        while time.monotonic() < end or (threads[-1].is_alive() and time.monotonic() < end + 600):
            time.sleep(0.2)
        done.set()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - begun
        bytes_at_end = server.service.live.fingerprints()
        on = [change.label for change in server.service.live.changes() if change.state == "active"]
    with LiveModel.load(args.model, workspace=folder, threads=args.threads) as live:
        ledger = live.fingerprints()  # of weights that a new process made from the ledger
    return {
        "clients": 16,
        "seconds": seconds,
        **counted,
        "errors": errors[:5],
        "error_count": len(errors),
        **switcher.told(),
        "left_on": on,
        "bytes_are_the_ledgers": bytes_at_end == ledger,
        "sites_unlike_the_base": sum(bytes_at_end[site] != base[site] for site in base),
        **_checked(args, folder),
    }


def _checked(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every token of every greedy reply, scored again under the weights that it names."""
    from liveweight import LiveModel
    from liveweight.engines.base import ScoreItem
    from liveweight.versions import moments, state_at

    wrong = close = tokens = 0
    with LiveModel.load(args.model, workspace=folder, threads=args.threads) as live:
        engine = live.engine
        states = {}
        for moment in moments(live.history(), engine.info.hash):
            state = state_at(live, moment)
            states[engine.version_hash(state)] = state
        replies = live.replies()
        for hash, state in states.items():
            parts = []  # of replies: prompt, what came before, the tokens that this version chose
            for reply in replies:
                at = 0
                for version, count in reply.details["spans"]:
                    if hash.startswith(version.split(":")[1]):
                        prompt = (*reply.prompt_token_ids, *reply.token_ids[:at])
                        parts.append(ScoreItem(prompt, reply.token_ids[at : at + count]))
                    at += count
            if not parts:
                continue
            unique = list(dict.fromkeys(parts))
            many = Counter(parts)
            with engine.preview(state):
                for item, score in zip(unique, engine.score(unique), strict=True):
                    tokens += many[item] * len(item.continuation)
                    off = (score.argmax != score.tokens).nonzero()[:, 0].tolist()
                    for place in off:
                        # Two tokens that are as likely as each other may come either way round.
                        best = engine.score(
                            [ScoreItem((*item.prompt, *item.continuation[:place]), (int(score.argmax[place]),))]
                        )[0]
                        tie = abs(float(best.logprobs[0]) - float(score.logprobs[place])) < 1e-3
                        close, wrong = close + tie, wrong + (not tie)
    return {"tokens_checked": tokens, "tokens_wrong": wrong, "tokens_tied": close}


def identical(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Replies before any change, and after 100 changes were made and undone."""
    plan = [
        (question, {"temperature": 0} if number % 2 else {"temperature": 0.9, "top_p": 0.95}, number)
        for number in range(args.replies)
        for question in [f"{QUESTIONS[number % 16]} ({number})"]
    ]

    def asked(server: Served) -> list[bytes]:
        with server.client() as client, ThreadPoolExecutor(16) as pool:

            def one(each: tuple[str, dict[str, Any], int]) -> bytes:
                question, sampling, seed = each
                answer = chat(client, question, args.tokens, seed=seed, **sampling)
                return str(answer["choices"][0]["message"]["content"]).encode()

            return list(pool.map(one, plan))

    with served(folder, args.model, args.threads, probes=args.probes, page=False) as server:
        before = asked(server)
        switcher = Switcher(server, args.changes)
        switcher.run()
        after = asked(server)
    same = sum(a == b for a, b in zip(before, after, strict=True))
    return {
        "replies": len(plan), "identical": same, "distinct_replies": len(set(before)), **switcher.told(),
    }  # fmt: skip


def kill(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`kill -9` at random instants; what was acknowledged has to be there afterwards."""
    draw = random.Random(args.seed)
    server = Served(folder, args.model, args.threads, probes=args.probes, page=False)
    server.start()
    restarts: list[float] = []
    lost: list[str] = []
    known: dict[str, str] = {}  # change -> state that was acknowledged last
    sent: dict[str, str] = {}  # change -> state that was asked for, when no answer came
    counted: Counter[str] = Counter()
    for round_ in range(args.kills):
        stop = threading.Event()
        replies: list[str] = []
        jobs: list[str] = []

        def chats(number: int, stop: threading.Event = stop, into: list[str] = replies, round_: int = round_) -> None:
            order = random.Random(1000 * round_ + number)
            with server.client() as client:
                while not stop.is_set():
                    try:
                        into.append(chat(client, order.choice(QUESTIONS), 8)["liveweight"]["reply"])
                    except (httpx.HTTPError, ValueError):
                        return

        def switches(stop: threading.Event = stop, into: list[str] = jobs, round_: int = round_) -> None:
            with server.client() as client:
                number = 0
                try:
                    status = client.get("/v1/live/status").json()
                except (httpx.HTTPError, ValueError):
                    return
                while not stop.is_set():
                    number += 1
                    body = weight_change(100 * round_ + number, status["layers"], status["neurons"])
                    try:
                        answer = client.post(
                            "/v1/live/changes", json=body, headers={"idempotency-key": f"{round_}-{number}"}
                        )
                        into.append(answer.json()["id"])
                        job = ended(client, answer.json())
                        if job["status"] != "done":
                            continue
                        change = job["result"]["change"]["label"]
                        known[change] = "active"
                        for verb, state in (("off", "off"), ("on", "active"), ("undo", "undone")):
                            sent[change] = state
                            client.post(f"/v1/live/changes/{change}/{verb}").raise_for_status()
                            known[change] = state
                            sent.pop(change)
                    except (httpx.HTTPError, ValueError, KeyError):
                        return

        threads = [threading.Thread(target=chats, args=(number,)) for number in range(4)]
        threads.append(threading.Thread(target=switches))
        for thread in threads:
            thread.start()
        time.sleep(draw.uniform(0.3, args.longest))
        server.kill()
        stop.set()
        for thread in threads:
            thread.join()
        restarts.append(server.start())
        with server.client() as client:
            for reply in replies:
                counted["replies"] += 1
                if client.get(f"/v1/live/replies/{reply}").status_code != 200:
                    lost.append(f"reply {reply}")
            for job in jobs:
                counted["jobs"] += 1
                answer = client.get(f"/v1/live/jobs/{job}?wait=60")
                if answer.status_code != 200:
                    lost.append(f"job {job}")
                    continue
                found = ended(client, answer.json())
                if found["status"] == "done":
                    change = found["result"]["change"]["label"]
                    known.setdefault(change, "active")
            for change, state in known.items():
                counted["changes"] += 1
                found = client.get(f"/v1/live/changes/{change}").json()["state"]
                if found not in (state, sent.get(change, state)):
                    lost.append(f"change {change}: {found} instead of {state}")
                known[change] = found
            sent.clear()
            made = [each["label"] for each in client.get("/v1/live/changes?limit=1000").json()]
            if len(set(made)) != len(made):
                lost.append("a change twice")
    server.stop()
    return {
        "kills": args.kills, **counted, "distinct_changes": len(known), "lost": lost,
        "restart_seconds": [round(each, 2) for each in restarts],
        "restart_seconds_median": statistics.median(restarts), "restart_seconds_worst": max(restarts),
    }  # fmt: skip


def bad(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What nobody should send."""
    statuses: Counter[int] = Counter()
    strange: list[str] = []
    with served(folder, args.model, args.threads, request_seconds=5, page=False) as server, server.client() as client:
        told = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
        long = [{"role": "user", "content": "x " * 20000}]
        typed = {"content-type": "application/json"}
        cases: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/v1/chat/completions", {"content": b"{", "headers": typed}),
            ("POST", "/v1/chat/completions", {"content": b"\xff\xfe", "headers": typed}),
            ("POST", "/v1/chat/completions", {"content": b"x=1"}),
            ("POST", "/v1/chat/completions", {"json": []}),
            ("POST", "/v1/chat/completions", {"json": {"model": MODEL}}),
            ("POST", "/v1/chat/completions", {"json": told | {"messages": "hi"}}),
            ("POST", "/v1/chat/completions", {"json": told | {"temperature": "hot"}}),
            ("POST", "/v1/chat/completions", {"json": told | {"max_tokens": -1}}),
            ("POST", "/v1/chat/completions", {"json": told | {"n": 10**9}}),
            ("POST", "/v1/chat/completions", {"json": told | {"seed": 10**40}}),
            ("POST", "/v1/chat/completions", {"json": told | {"model": "../../etc/passwd"}}),
            ("POST", "/v1/chat/completions", {"json": told | {"messages": long}}),
            ("POST", "/v1/chat/completions", {"content": b" " * 2_000_000, "headers": typed}),
            ("POST", "/v1/completions", {"json": {"model": MODEL, "prompt": [10**12]}}),
            ("GET", "/v1/live/changes/..%2f..%2fetc%2fpasswd", {}),
            ("GET", "/v1/live/changes/c99999999999999999999999", {}),
            ("GET", "/v1/live/replies/%00", {}),
            ("GET", "/v1/live/replies/r-1", {}),
            ("GET", "/v1/live/jobs/" + "j" * 5000, {}),
            ("PUT", "/v1/live/changes/c1/strength", {"content": b'{"strength": NaN}', "headers": typed}),
            ("PUT", "/v1/live/changes/c1/strength", {"content": b'{"strength": 1e999}', "headers": typed}),
            ("POST", "/v1/live/replies/r1/feedback", {"json": {"verdict": "fix"}}),
            ("POST", "/v1/live/replies/r1/feedback", {"json": {"verdict": "love"}}),
            ("POST", "/v1/live/learn", {"json": {"lessons": []}}),
            ("GET", "/v1/live/replies?limit=-5", {}),
            ("DELETE", "/v1/live/changes/c1", {}),
            ("GET", "/healthz", {"headers": {"host": "evil.example"}}),
            ("POST", "/v1/live/undo", {"headers": {"origin": "http://evil.example"}}),
        ]  # fmt: skip
        for method, path, more in cases:
            answer = client.request(method, path, **more)
            statuses[answer.status_code] += 1
            if not 400 <= answer.status_code < 500:
                strange.append(f"{method} {path[:60]}: {answer.status_code}")
        slow = []
        where = httpx.URL(server.url)
        for number in range(args.slow):
            connection = socket.create_connection((where.host, where.port or 80), timeout=30)
            # Half of them never end their head, the others never end their body.
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            connection.sendall(
                head + (b"content-type: application/json\r\ncontent-length: 50\r\n\r\n{" if number % 2 else b"x-a: ")
            )
            slow.append(connection)
        begun = time.monotonic()
        chat(client, "Hi", 2)
        among = time.monotonic() - begun
        ends: Counter[str] = Counter()
        for connection in slow:
            connection.settimeout(30)
            try:
                data = connection.recv(4096)
                ends["408" if b" 408 " in data[:20] else "closed" if not data else data[:15].decode()] += 1
            except ConnectionError:
                ends["closed"] += 1
            except TimeoutError:
                ends["hang"] += 1
            connection.close()
        closed = time.monotonic() - begun
        chat(client, "Hi", 2)
    return {
        "cases": len(cases), "statuses": {str(key): value for key, value in sorted(statuses.items())},
        "not_4xx": strange, "slow_connections": args.slow, "slow_ended": dict(ends),
        "seconds_to_close_them": closed, "chat_among_them_seconds": among,
    }  # fmt: skip


def main() -> None:
    global MODEL
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--changes", type=int, default=60)
    parser.add_argument("--replies", type=int, default=500)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--longest", type=float, default=8.0, help="seconds before a kill, at most")
    parser.add_argument("--slow", type=int, default=1000)
    parser.add_argument("--probes", type=int, default=4, help="of the guard, in load, identical and kill; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    MODEL = args.model
    found = json.loads(args.json.read_text()) if args.json.exists() else {}
    for part in args.only.split(","):
        folder = Path(tempfile.mkdtemp(prefix=f"liveweight-{part}-"))
        print(f"{part} …", file=sys.stderr, flush=True)
        found[part] = globals()[part](args, folder / "workspace") | {"model": MODEL, "threads": args.threads}
        args.json.write_text(json.dumps(found, indent=1))
        print(json.dumps({part: found[part]}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
