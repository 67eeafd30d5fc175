"""puna's server against llama.cpp's: the same requests over HTTP, the same GGUF, the same threads.

    python -m benchmarks.server --llama-server PATH [--runs 3] [--threads 2]

Each run of a side is a fresh process: ``puna serve --quantize int4``, or ``llama-server`` with sixteen slots
and continuous batching, both with the 4-bit GGUF of SmolLM2-135M-Instruct. Sides take turns. Both are sent
the same token ids by the same client, greedy, with no stop token; streams are read as they come. Three loads:
two requests a second, the highest rate that both bear, and sixteen requests of mixed length at once.

A rate is borne where the median request has its first token within a second and the last one ends within
five seconds after it came. Rates are tried from below, each on a fresh stretch of text: no server finds a
prompt that it has read before, and llama.cpp's need not keep any (``--cache-ram 0``).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.server_client import ROOT

ASSET = "smollm2-135m-instruct"
SLOTS = 16
CONTEXT = 1024  # tokens of a slot; the longest request has 64 + 447 + 255
RATES = (0.5, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0)  # requests a second that are tried, from below
SECONDS = 12  # of a load by rate, which has twelve requests at least
console = Console(width=int(os.environ.get("COLUMNS", "150")))


@dataclass(frozen=True)
class Request:
    """Ids to go on from by so many tokens; ``arrives`` seconds after the start."""

    ids: tuple[int, ...]
    tokens: int
    arrives: float


@dataclass(frozen=True)
class Load:
    """Requests by lengths and arrival; ``offset`` is where in the text their prompts are cut from."""

    name: str
    shapes: tuple[tuple[int, int, float], ...]
    offset: int

    def requests(self, ids: Sequence[int]) -> list[Request]:
        """The requests, their prompts from different places of the text."""
        found, place = [], self.offset
        for length, tokens, arrives in self.shapes:
            found.append(Request(tuple(ids[place : place + length]), tokens, arrives))
            place += 61
        return found


def by_rate(rate: float, offset: int) -> Load:
    """So many requests a second, evenly."""
    shapes = tuple((64 + 173 * i % 448, 32, i / rate) for i in range(max(SECONDS, round(SECONDS * rate))))
    return Load(f"{rate:g} requests a second", shapes, offset)


MIXED = Load(
    f"{SLOTS} at once", tuple((64 + 173 * i % 448, 64 + 89 * i % 192, 0.0) for i in range(SLOTS)), 20_000
)


@dataclass(frozen=True)
class Served:
    """Of one request: seconds from its arrival to the first token and to the last, and its tokens."""

    arrives: float
    first: float
    last: float
    tokens: int


@dataclass(frozen=True)
class Result:
    """What became of a load."""

    served: tuple[Served, ...]

    def first(self, share: float) -> float:
        """Seconds to the first token that this share of the requests did not exceed."""
        waits = sorted(one.first for one in self.served)
        return waits[min(len(waits) - 1, int(share * len(waits)))]

    @property
    def speed(self) -> float:
        """Output tokens a second, from the first arrival to the last token."""
        return sum(one.tokens for one in self.served) / max(one.arrives + one.last for one in self.served)

    @property
    def borne(self) -> bool:
        """Whether the server kept up."""
        end = max(one.arrives + one.last for one in self.served)
        return self.first(0.5) < 1 and end < max(one.arrives for one in self.served) + 5


# ---- the two servers ------------------------------------------------------------------------------------


class Peer:
    """A server in a process of its own; ``extra`` is what its bodies have besides the common fields."""

    def __init__(
        self, words: Sequence[str], port: int, log: Path, threads: int, extra: dict[str, Any]
    ) -> None:
        self.port, self.extra = port, extra
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with log.open("w") as told:
            self._process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=told, stderr=told)
        end = time.monotonic() + 120
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self._process.kill()
                raise SystemExit(f"{words[0]} did not start: {log.read_text().strip()[-500:]}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return b" 200 " in connection.recv(100)
        except OSError:
            return False

    def end(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait(60)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def puna(gguf: Path, log: Path, threads: int) -> Peer:
    """``puna serve`` with 4-bit layers and an 8-bit head, as the GGUF has them."""
    port = free_port()
    words = [sys.executable, "-m", "puna.cli", "serve", f"{ASSET}={gguf}", "--port", str(port)]
    words += ["--quantize", "int4", "--cache-tokens", str(SLOTS * CONTEXT), "--device", "cpu"]
    return Peer(words, port, log, threads, {})


def llama_server(program: Path) -> Callable[[Path, Path, int], Peer]:
    """llama.cpp's, at its defaults but for slots, context, threads and prompts kept."""

    def start(gguf: Path, log: Path, threads: int) -> Peer:
        port = free_port()
        words = [str(program.resolve()), "-m", str(gguf), "--port", str(port), "--host", "127.0.0.1"]
        words += ["-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "-t", str(threads), "-tb", str(threads)]
        words += ["--cache-ram", "0"]
        return Peer(words, port, log, threads, {})

    return start


# ---- the client -----------------------------------------------------------------------------------------


async def serve(peer: Peer, requests: Sequence[Request]) -> Result:
    """Send each request at its time and read its stream."""
    start = time.perf_counter()
    return Result(tuple(await asyncio.gather(*(_one(peer, request, start) for request in requests))))


async def _one(peer: Peer, request: Request, start: float) -> Served:
    await asyncio.sleep(max(0.0, start + request.arrives - time.perf_counter()))
    began = time.perf_counter()
    body = json.dumps(
        {
            "model": ASSET,
            "prompt": list(request.ids),
            "max_tokens": request.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **peer.extra,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", peer.port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    first = last = 0.0
    usage: dict[str, int] = {}
    try:
        while line := await reader.readline():
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                usage = event["usage"]
            if event.get("choices"):
                last = time.perf_counter() - began
                first = first or last
    finally:
        writer.close()
    if usage.get("completion_tokens") != request.tokens:
        raise SystemExit(f"a request for {request.tokens} tokens got {usage}")
    return Served(request.arrives, first, last, request.tokens)


# ---- the comparison -------------------------------------------------------------------------------------


def token_ids(gguf: Path) -> list[int]:
    """Ids of real text: Python's own documentation."""
    from pydoc_data.topics import topics

    from puna.text.pretrained import load

    tokenizer = load(gguf).tokenizer
    assert tokenizer is not None
    ids: list[int] = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics))[:250_000])
    return ids


Start = Callable[[Path, Path, int], Peer]


def run(
    start: Start, loads: Sequence[Load], ids: Sequence[int], gguf: Path, log: Path, threads: int
) -> list[Result]:
    """One fresh process that serves the loads one after the other, after a request that is not counted."""
    peer = start(gguf, log, threads)
    try:
        asyncio.run(serve(peer, [Request(tuple(ids[-64:]), 8, 0.0)]))
        return [asyncio.run(serve(peer, load.requests(ids))) for load in loads]
    finally:
        peer.end()


def highest(start: Start, ids: Sequence[int], gguf: Path, log: Path, threads: int) -> float:
    """The highest of the rates that a server bears, in one process; 0 if it bears none of them."""
    peer = start(gguf, log, threads)
    found = 0.0
    try:
        asyncio.run(serve(peer, [Request(tuple(ids[-64:]), 8, 0.0)]))
        for number, rate in enumerate(RATES):
            if not asyncio.run(serve(peer, by_rate(rate, 6000 * number).requests(ids))).borne:
                break
            found = rate
    finally:
        peer.end()
    return found


def compare(program: Path, *, runs: int, threads: int) -> int:
    """Print how the two fare; 0."""
    import tempfile

    from puna.core import assets

    gguf = assets.fetch(ASSET)
    ids = token_ids(gguf)
    sides: dict[str, Start] = {"puna": puna, "llama.cpp": llama_server(program)}
    with tempfile.TemporaryDirectory(prefix="puna-server-") as folder:
        log = Path(folder) / "server.log"
        rates = {name: highest(start, ids, gguf, log, threads) for name, start in sides.items()}
        told = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        console.print(f"requests a second borne: {told}")
        both = min(rates.values())
        loads = [by_rate(2, 0), *([by_rate(both, 10_000)] if both not in (0, 2) else []), MIXED]
        found: dict[str, list[list[Result]]] = {name: [] for name in sides}
        for number in range(runs):
            for name, start in sides.items():
                found[name].append(run(start, loads, ids, gguf, log, threads))
                told = "; ".join(_told(result) for result in found[name][-1])
                console.print(f"run {number + 1}: {name}: {told}")
    console.print(_table(loads, found, runs))
    return 0


def _told(result: Result) -> str:
    waits = f"{1000 * result.first(0.5):.0f}/{1000 * result.first(0.99):.0f} ms"
    return f"{waits}, {result.speed:.0f} tokens/s"


FIGURES: dict[str, tuple[Callable[[Result], float], Callable[[float], str], bool]] = {
    "first token, median": (lambda result: result.first(0.5), lambda value: f"{1000 * value:.0f} ms", False),
    "first token, p99": (lambda result: result.first(0.99), lambda value: f"{1000 * value:.0f} ms", False),
    "output": (lambda result: result.speed, lambda value: f"{value:.0f} tokens/s", True),
}


def _table(loads: Sequence[Load], found: dict[str, list[list[Result]]], runs: int) -> Table:
    table = Table(title=f"{ASSET}, 4 bits: medians of {runs} runs of fresh processes in turn")
    for column in ("load", "figure", *found, "puna is better by"):
        table.add_column(column)
    for place, load in enumerate(loads):
        for says, (figure, write, more) in FIGURES.items():
            values = {name: [figure(results[place]) for results in side] for name, side in found.items()}
            ours, theirs = values["puna"], values["llama.cpp"]
            ratios = [one / other if more else other / one for one, other in zip(ours, theirs, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells = [write(statistics.median(side)) for side in values.values()]
            table.add_row(load.name, says, *cells, ratio)
    return table
