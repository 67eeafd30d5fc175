"""A client that can misbehave: it stalls, leaves, sends too much or too little. Standard library alone."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "drill"
CACHE_TOKENS = 8192  # of a server's cache: soon in use as a whole, so that what grows then is something else


@dataclass
class Answer:
    """What came back: status, headers, the body, and for a stream its events."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float = 0.0

    @property
    def events(self) -> list[str]:
        """The data of each event of a stream."""
        parts = self.body.decode().split("\n\n")
        return [part.removeprefix("data: ") for part in parts if part.startswith("data: ")]

    @property
    def whole(self) -> bool:
        """Whether a stream came to its end."""
        return self.status == 200 and self.events[-1:] == ["[DONE]"]

    @property
    def text(self) -> str:
        """The text of a completion, streamed or not."""
        if "text/event-stream" not in self.headers.get("content-type", ""):
            return str(json.loads(self.body)["choices"][0]["text"])
        return "".join(
            choice["text"] for event in self.events[:-1] for choice in json.loads(event).get("choices", [])
        )

    @property
    def code(self) -> str | None:
        """The code of an error of OpenAI's shape; None for anything else."""
        try:
            error = json.loads(self.body)["error"]
            return str(error["code"]) if set(error) == {"message", "type", "param", "code"} else None
        except (ValueError, KeyError, TypeError):
            return None


@dataclass
class Client:
    """Asks a server at a port of this machine."""

    port: int
    open: int = field(default=0)

    async def ask(
        self,
        body: bytes | dict[str, Any],
        path: str = "/v1/completions",
        *,
        kind: str = "application/json",
        method: str = "POST",
        chunked: bool = False,
        declared: int | None = None,
        pause: float = 0.0,
        leave_after: int | None = None,
    ) -> Answer:
        """One request on a connection of its own.

        ``pause``: seconds between reads of a few bytes. ``leave_after``: bytes of the answer after which
        the connection is closed. ``declared``: a Content-Length that is not the body's.
        """
        start = time.monotonic()
        data = json.dumps({"model": MODEL, **body}).encode() if isinstance(body, dict) else body
        limit = 256 if pause else 1 << 16
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        try:
            length = f"Content-Length: {len(data) if declared is None else declared}"
            lines = [
                f"{method} {path} HTTP/1.1",
                "Host: localhost",
                "Connection: close",
                f"Content-Type: {kind}",
            ]
            lines.append("Transfer-Encoding: chunked" if chunked else length)
            writer.write("\r\n".join([*lines, "", ""]).encode())
            if chunked:
                for place in range(0, len(data), 65536):
                    piece = data[place : place + 65536]
                    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                writer.write(b"0\r\n\r\n")
            else:
                writer.write(data)
            got = await self._read(reader, pause, leave_after)
        finally:
            writer.close()
        return _parsed(got, time.monotonic() - start)

    async def _read(self, reader: asyncio.StreamReader, pause: float, leave_after: int | None) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            try:
                part = await reader.read(64 if pause else 65536)
            except ConnectionError:
                break
            if not part:
                break
            parts.append(part)
            size += len(part)
            if leave_after is not None and size >= leave_after:
                break
            if pause:
                await asyncio.sleep(pause)
        return b"".join(parts)

    async def metrics(self) -> dict[str, float]:
        """The engine's figures."""
        answer = await self.ask(b"", "/metrics", method="GET")
        pairs = re.findall(
            rb'^puna_engine_(\w+?)(?:_total)?\{model="[^"]*"\} (\S+)$', answer.body, re.MULTILINE
        )
        return {name.decode(): float(value) for name, value in pairs}

    async def idle(self, seconds: float = 120.0) -> dict[str, float]:
        """The engine's figures once nothing runs or waits; those of the last look if that takes too long."""
        end = time.monotonic() + seconds
        while True:
            found = await self.metrics()
            if not found["running"] + found["waiting"] or time.monotonic() > end:
                return found
            await asyncio.sleep(0.05)


def _parsed(got: bytes, seconds: float) -> Answer:
    head, _, body = got.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    status = int(lines[0].split()[1]) if lines[0].startswith("HTTP/") else 0
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunked(body)
    return Answer(status, headers, body, seconds)


def _unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        if not size or int(size, 16) == 0:
            break
        length = int(size, 16)
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)


class Server:
    """``puna serve`` in a process of its own."""

    def __init__(self, model: str, log: Path, *, dtype: str = "auto", **settings: Any) -> None:
        words = [
            sys.executable,
            "-m",
            "puna.cli",
            "serve",
            f"{MODEL}={model}",
            "--port",
            "0",
            "--device",
            "cpu",
        ]
        words += ["--cache-tokens", str(CACHE_TOKENS), "--dtype", dtype]
        for key, value in settings.items():
            words += ["--set", f"{key}={value}"]
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self.process.stdout is not None
        told = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", told)
        if found is None:
            self.process.kill()
            raise SystemExit(f"the server did not start: {told}{log.read_text()}")
        self.client = Client(int(found[1]))

    def status(self) -> dict[str, int]:
        """Resident bytes, threads and open files of the process."""
        folder = Path("/proc") / str(self.process.pid)
        text = (folder / "status").read_text()
        field = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", text, re.MULTILINE)}
        return {
            "memory": field["VmRSS"] * 1024,
            "threads": field["Threads"],
            "files": len(list((folder / "fd").iterdir())),
        }

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> int:
        """End the process, at once if it does not end by itself; its exit code."""
        if self.process.poll() is None:
            self.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def environment() -> dict[str, str]:
    """The environment of a server of the drill."""
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "COLUMNS": "400"}
