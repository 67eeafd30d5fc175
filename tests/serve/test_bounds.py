"""What the server refuses, and what it does with clients that leave, stall or never end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.serve.little_server import Live, live, slowed, tiny_catalog, wait_for

LONG = {"model": "tiny", "prompt": "the cat", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}


@contextmanager
def raw(server: Live) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        yield connection


def request_bytes(path: str, body: bytes, **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if "Content_Length" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def error_of(answer: httpx.Response | bytes) -> tuple[int, str]:
    if isinstance(answer, bytes):
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)["error"]["code"]
    return answer.status_code, answer.json()["error"]["code"]


def test_a_body_that_is_too_large_is_refused_by_its_length_or_as_it_comes(tiny_tokenizer: Any) -> None:
    with live(tiny_catalog(tiny_tokenizer), max_body_bytes=1000) as server:
        large = json.dumps({"model": "tiny", "prompt": "a" * 1000}).encode()
        with raw(server) as connection:  # only the head is sent: nobody waits for the rest
            connection.sendall(request_bytes("/v1/completions", b"", Content_Length="1001"))
            assert error_of(read_all(connection)) == (413, "body_too_large")

        def chunks() -> Iterator[bytes]:
            yield large[:600]
            yield large[600:]

        kind = {"content-type": "application/json"}
        assert error_of(server.http.post("/v1/completions", content=chunks(), headers=kind)) == (
            413,
            "body_too_large",
        )
        assert server.completion()["choices"]


def test_bodies_together_are_bounded(tiny_tokenizer: Any) -> None:
    half = json.dumps({"model": "tiny", "prompt": "a" * 600}).encode()
    with live(tiny_catalog(tiny_tokenizer), max_held_bytes=1000) as server:
        with raw(server) as first:
            first.sendall(request_bytes("/v1/completions", half[:-1], Content_Length=str(len(half))))
            assert wait_for(lambda: server.http.post("/v1/completions", content=half).status_code == 429)
            answer = server.http.post("/v1/completions", content=half)
            assert error_of(answer) == (429, "too_much_held")
            assert answer.headers["retry-after"] == "1"
        kind = {"content-type": "application/json"}
        assert wait_for(
            lambda: server.http.post("/v1/completions", content=half, headers=kind).status_code == 200
        )


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b'{"model": "tiny", "prompt": ', "application/json", 400, "invalid_json"),
        (b"[1, 2]", "application/json", 400, "invalid_type"),
        (b"", "application/json", 400, "invalid_type"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "application/json", 400, "invalid_value"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "application/json", 400, "invalid_value"),
        (b'{"model": "tiny", "prompt": "a", "seed": 1e400}', "application/json", 400, "invalid_value"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"model": "tiny", "prompt": ""}', "application/json", 400, "invalid_value"),
        (b'{"model": "tiny"}', "application/json", 400, "missing_required_parameter"),
        (b'{"model": "tiny", "prompt": "a"}', "text/plain", 415, "media_type"),
        (b"model=tiny&prompt=a", "application/x-www-form-urlencoded", 415, "media_type"),
    ],
)
def test_malformed_bodies(server: Live, body: bytes, kind: str, status: int, code: str) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": kind})
    assert error_of(answer) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/json"


def test_what_is_not_http_gets_an_error_too(server: Live) -> None:
    with raw(server) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert error_of(read_all(connection)) == (400, "invalid_http")
    with raw(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 40_000)
        assert error_of(read_all(connection)) == (400, "invalid_http")


def test_unknown_paths_and_methods(server: Live) -> None:
    answer = server.http.get("/v2/nothing")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    answer = server.http.get("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "GET" in answer.json()["error"]["message"]


def test_a_head_that_does_not_come_in_time(tiny_tokenizer: Any) -> None:
    with live(tiny_catalog(tiny_tokenizer), head_seconds=0.2) as server, raw(server) as connection:
        connection.sendall(b"POST /v1/completions HT")
        assert error_of(read_all(connection)) == (408, "head_timeout")


def test_a_body_that_does_not_come_in_time(tiny_tokenizer: Any) -> None:
    with live(tiny_catalog(tiny_tokenizer), body_seconds=0.2) as server, raw(server) as connection:
        connection.sendall(request_bytes("/v1/completions", b'{"model"', Content_Length="500"))
        assert error_of(read_all(connection)) == (408, "body_timeout")


def test_an_idle_connection_after_an_answer_is_no_late_head(tiny_tokenizer: Any) -> None:
    """It is uvicorn's to close. The bound is large enough for a client that the machine keeps waiting."""
    with live(tiny_catalog(tiny_tokenizer), head_seconds=1.0) as server, raw(server) as connection:
        for wait in (1.3, 0):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(wait)


def test_other_names_than_its_own_are_not_answered(server: Live) -> None:
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert server.http.get("/health", headers={"host": host}).status_code == 200, host
    for host in ("puna.test", "localhost.puna.test", "[::2]", ""):
        assert error_of(server.http.get("/health", headers={"host": host})) == (403, "host_not_allowed"), host


def test_more_connections_than_allowed_get_429(tiny_tokenizer: Any) -> None:
    with live(tiny_catalog(tiny_tokenizer), max_connections=2) as server, raw(server), raw(server):
        with raw(server) as third:
            answer = read_all(third)
        assert error_of(answer) == (429, "too_many_connections")
        assert b"\r\nRetry-After: 1\r\n" in answer


def test_a_full_queue_answers_429_and_tells_when_to_come_back(tiny_tokenizer: Any) -> None:
    with live(slowed(tiny_catalog(tiny_tokenizer)), max_queue=2) as server:
        with server.http.stream("POST", "/v1/completions", json={**LONG, "n": 2, "stream": True}) as running:
            coming = running.iter_bytes()  # kept: its end would close the connection
            next(coming)
            answer = server.post("/v1/completions", model="tiny", prompt="a")
            assert error_of(answer) == (429, "queue_full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert server.settled()
        assert server.completion()["choices"]


def test_an_answer_that_takes_too_long_ends_and_frees_its_cache(tiny_tokenizer: Any) -> None:
    with live(slowed(tiny_catalog(tiny_tokenizer)), request_seconds=0.3) as server:
        answer = server.post("/v1/completions", **LONG)
        assert error_of(answer) == (504, "timeout")
        assert server.settled()
        streamed = server.post("/v1/completions", **LONG, stream=True)
        events = streamed.text.strip().split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert events[-1] == "data: [DONE]"
        assert server.settled()


def test_a_request_that_waits_too_long_gets_429(tiny_tokenizer: Any) -> None:
    with live(slowed(tiny_catalog(tiny_tokenizer, max_running=1))) as server:
        with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as running:
            coming = running.iter_bytes()  # kept: its end would close the connection
            next(coming)
            # From here on: the one that runs must not be held to it, however slow the machine is.
            desk = server.house.desk
            desk.settings = desk.settings.model_copy(update={"queue_seconds": 0.2})
            answer = server.post("/v1/completions", model="tiny", prompt="a")
            assert error_of(answer) == (429, "queue_timeout")
            assert "retry-after" in answer.headers
        assert server.settled()


@pytest.fixture(scope="module")
def slow(tiny_tokenizer: Any) -> Iterator[Live]:
    with live(slowed(tiny_catalog(tiny_tokenizer))) as found:
        yield found


def left(server: Live) -> float:
    """How many clients are counted that left."""
    value: float = server.house.metrics.registry.get_sample_value("puna_left_total")  # type: ignore[assignment]
    return value


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_cache(slow: Live, stream: bool) -> None:
    server = slow
    before, written = left(server), server.statistics().tokens_written
    with raw(server) as connection:
        connection.sendall(request_bytes("/v1/completions", json.dumps({**LONG, "stream": stream}).encode()))
        assert wait_for(lambda: server.statistics().running > 0)
    assert server.settled()
    assert server.statistics().tokens_written < written + 1500
    assert left(server) == before + 1


def test_a_client_that_leaves_while_it_waits_is_forgotten(tiny_tokenizer: Any) -> None:
    with live(slowed(tiny_catalog(tiny_tokenizer, max_running=1))) as server:
        with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as running:
            coming = running.iter_bytes()  # kept: its end would close the connection
            next(coming)
            with raw(server) as connection:
                connection.sendall(request_bytes("/v1/completions", json.dumps(LONG).encode()))
                assert wait_for(lambda: server.statistics().waiting > 0)
            assert wait_for(lambda: server.statistics().waiting == 0)
            assert server.statistics().running == 1
        assert server.settled()


def test_a_reader_that_takes_nothing_is_cut_and_stalls_nobody(tiny_tokenizer: Any) -> None:
    # Each event is made large, so that the buffers between the two are full soon.
    big = {**LONG, "stream": True, "logprobs": 20, "n": 4}
    with live(tiny_catalog(tiny_tokenizer), stall_seconds=0.5) as server, socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", server.port))
        stuck.sendall(request_bytes("/v1/completions", json.dumps(big).encode()))
        end = time.monotonic() + 10
        while not server.statistics().running and time.monotonic() < end:
            time.sleep(0.005)
        assert server.completion()["choices"]  # others are served meanwhile
        assert server.settled(30)
        end = time.monotonic() + 10
        cut = False
        while not cut and time.monotonic() < end:
            try:
                # What was under way may still be read; then the connection is gone.
                cut = not stuck.recv(1 << 16)
            except ConnectionError:
                cut = True
        assert cut


def test_the_health_tells_of_an_engine_that_does_not_run(tiny_tokenizer: Any) -> None:
    with live(tiny_catalog(tiny_tokenizer)) as server:
        assert server.http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        server.house.catalog["tiny"].thread.stop()
        assert error_of(server.http.get("/health")) == (503, "engine_stopped")
        answer = server.post("/v1/completions", model="tiny", prompt="a")
        assert answer.status_code == 400 and "takes no further requests" in answer.text


def test_a_failure_of_the_engine_is_told_and_the_next_request_is_served(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(tiny_catalog(tiny_tokenizer)) as server:
        stepper = server.house.catalog["tiny"].engine._models["target"].stepper

        def fails(reads: Any) -> Any:
            raise RuntimeError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(stepper, "step", fails)
            answer = server.post("/v1/completions", model="tiny", prompt="a")
            assert error_of(answer) == (500, "internal_error")
            assert "broken" not in answer.text
            streamed = server.post("/v1/completions", model="tiny", prompt="a", stream=True)
            assert error_of(streamed) == (500, "internal_error")
        assert server.settled()
        assert server.completion()["choices"]


def test_what_runs_may_end_after_the_signal(tiny_tokenizer: Any) -> None:
    answers: list[httpx.Response] = []
    with live(slowed(tiny_catalog(tiny_tokenizer))) as server:
        asking = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 60}, timeout=30)
            )
        )
        asking.start()
        assert wait_for(lambda: server.statistics().running > 0)
    asking.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 60


def test_what_runs_past_the_time_for_draining_is_cancelled(tiny_tokenizer: Any) -> None:
    failures: list[BaseException] = []

    def ask(url: str) -> None:
        try:
            httpx.post(f"{url}/v1/completions", json={**LONG, "n": 8}, timeout=30).raise_for_status()
        except Exception as error:
            failures.append(error)

    with live(slowed(tiny_catalog(tiny_tokenizer)), drain_seconds=0.5) as server:
        asking = threading.Thread(target=ask, args=(server.url,))
        asking.start()
        assert wait_for(lambda: server.statistics().running > 0)
    asking.join()
    assert failures
    assert server.statistics().running == server.statistics().waiting == 0
