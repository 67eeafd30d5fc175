"""The server drill: a real server is flooded, starved, misled and abandoned, and must answer all the same.

    python -m benchmarks.server             # 200 streams, 2,000 requests, on a tiny Llama made on the spot
    python -m benchmarks.server --quick     # 40 streams, 300 requests
    python -m benchmarks.server --model smollm2-135m-instruct --only streams --only sigterm
    python -m benchmarks.server --llama-server PATH       # speed against llama.cpp's server instead

The server is ``puna serve`` in a process of its own; everything goes over this machine's loopback. Prints a
table; the exit code is 1 if a demand was not met. The case of lm_eval runs where that command is found
(``LM_EVAL`` may name it), and says so where it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import server_lm_eval as harness
from benchmarks.faults_setting import tiny_model
from benchmarks.server_client import CACHE_TOKENS, MODEL, Answer, Server

WORDS = "the cat and other sat on that mat in then it went red moon".split()  # noqa: SIM905 - to be read
BODY_BYTES = 256 * 1024
GROWTH_BYTES = 12 * 1024 * 1024  # what 2,000 requests may leave: pools of the allocator, not one request each


@dataclass(frozen=True)
class Verdict:
    """What was done to the server, what was seen, and what of the demands was not met."""

    case: str
    done: str
    seen: str
    failures: tuple[str, ...] = ()


@dataclass
class Drill:
    """One drill in ``folder`` against servers of ``model``."""

    folder: Path
    model: str
    streams: int
    requests: int
    generator: random.Random
    verdicts: list[Verdict] = field(default_factory=list)
    _servers: list[Server] = field(default_factory=list)

    def server(self, dtype: str = "auto", **settings: Any) -> Server:
        """A server with these settings, running until the drill ends."""
        log = self.folder / f"server-{len(self._servers)}.log"
        made = Server(self.model, log, dtype=dtype, **{"max_body_bytes": BODY_BYTES, **settings})
        self._servers.append(made)
        return made

    def prompt(self) -> str:
        """Some words, drawn."""
        return " ".join(self.generator.choices(WORDS, k=self.generator.randint(3, 20)))

    def request(self, tokens: int = 24, **body: Any) -> dict[str, Any]:
        """A request for a text of its own of exactly so many tokens."""
        seed = self.generator.randrange(2**31)
        usual = {"prompt": self.prompt(), "max_tokens": tokens, "seed": seed, "ignore_eos": True}
        return {**usual, "temperature": 1.0, **body}

    def judge(self, case: str, done: str, seen: str, failures: Sequence[str]) -> None:
        """Note what became of a case, and tell at once: the whole drill takes minutes."""
        self.verdicts.append(Verdict(case, done, seen, tuple(failures)))
        print(f"{case}: {'; '.join(failures) or 'met'} ({seen})", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End what still runs, and look into the logs: no server may have shown a traceback."""
        for server in self._servers:
            server.end()
        logs = [server.log.read_text() for server in self._servers]
        shown = [log.strip().splitlines()[-1] for log in logs if "Traceback" in log]
        seen = "no traceback" if not shown else shown[0]
        self.judge(
            "logs", f"error output of {len(logs)} servers", seen, [f"a traceback: {line}" for line in shown]
        )


# ---- the cases ------------------------------------------------------------------------------------------


async def streams(drill: Drill) -> None:
    """Many streams at once, each the text that it is alone."""
    server = drill.server()
    bodies = [drill.request(stream=True) for _ in range(drill.streams)]
    answers = await asyncio.gather(*(server.client.ask(body) for body in bodies))
    failures = _all(answers, lambda answer: answer.whole, "did not come whole")
    checked = bodies[:: max(1, len(bodies) // 16)]
    for body, answer in zip(checked, answers[:: max(1, len(bodies) // 16)], strict=True):
        alone = await server.client.ask({**body, "stream": False})
        if alone.text != answer.text:
            failures.append(f"seed {body['seed']}: another text than alone")
    figures = await server.client.idle()
    failures += _left(figures)
    slowest = max(answer.seconds for answer in answers)
    seen = (
        f"all whole, the slowest after {slowest:.1f} s; {len(checked)} compared with the same request alone"
    )
    drill.judge("streams", f"{len(bodies)} streams at once", seen, failures)


async def slow_readers(drill: Drill) -> None:
    """Readers of a few bytes at a time; others are served as if they were not there."""
    server = drill.server(stall_seconds=2)
    count = max(8, drill.streams // 8)
    normal = [drill.request() for _ in range(count)]
    before = await asyncio.gather(*(server.client.ask(body) for body in normal))
    slow = [
        asyncio.create_task(server.client.ask(drill.request(200, stream=True), pause=0.05))
        for _ in range(count)
    ]
    await asyncio.sleep(0.5)
    await server.client.idle()
    among = await asyncio.gather(*(server.client.ask(body) for body in normal))
    unread = sum(not task.done() for task in slow)
    figures = await server.client.idle()
    failures = _all(among, lambda answer: answer.status == 200, "was not answered")
    failures += [] if [a.text for a in among] == [b.text for b in before] else ["texts differ"]
    failures += _left(figures) + ([] if unread else ["the slow readers were not slow"])
    ratio = max(a.seconds for a in among) / max(b.seconds for b in before)
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    seen = f"{unread} were still reading when the others had their texts, after {ratio:.2f} times the time"
    drill.judge(
        "slow readers", f"{count} readers of 64 bytes every 50 ms beside {count} others", seen, failures
    )


async def disconnects(drill: Drill) -> None:
    """Clients that leave in the middle: their requests end and their cache is free."""
    server = drill.server()
    count = drill.streams // 2
    tasks = [
        server.client.ask(
            drill.request(800, stream=place % 2 == 0, n=1 + place % 3),
            leave_after=drill.generator.randint(1, 4000),
        )
        if place % 2 == 0
        else _leaving(server, drill.request(800), drill.generator.uniform(0.0, 1.0))
        for place in range(count)
    ]
    await asyncio.gather(*tasks)
    figures = await server.client.idle()
    failures = _left(figures)
    if figures["tokens_written"] > 0.8 * 800 * count:
        failures.append("the texts were made to their ends for nobody")
    after = await server.client.ask(drill.request())
    failures += _all([after], lambda answer: answer.status == 200, "was not answered afterwards")
    seen = f"{figures['tokens_written']:,.0f} tokens made of {800 * count:,} or more; cache blocks in use: 0"
    drill.judge("disconnects", f"{count} clients left streams and waiting requests", seen, failures)


async def oversized(drill: Drill) -> None:
    """Bodies beyond the bound, declared or not."""
    server = drill.server()
    large = json.dumps({"model": "drill", "prompt": "a" * (2 * BODY_BYTES)}).encode()
    asked = [
        server.client.ask(large),
        server.client.ask(large, chunked=True),
        server.client.ask(b"", declared=10**15),
        server.client.ask(drill.request(prompt="a" * 1000, stop=["b"] * 17)),
        server.client.ask(drill.request(10**6)),
        server.client.ask(drill.request(n=100_000)),
    ]
    answers = await asyncio.gather(*asked)
    found = [(answer.status, answer.code) for answer in answers]
    expected = [(413, "body_too_large")] * 3 + [(400, "beyond_bound")] * 2 + [(400, "too_many_answers")]
    failures = [] if found == expected else [f"answered {found}, not {expected}"]
    drill.judge(
        "oversized", "bodies, declared lengths, tokens, answers beyond the bounds", _codes(answers), failures
    )


async def malformed(drill: Drill) -> None:
    """Bodies that mean nothing."""
    server = drill.server()
    bodies = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe\x00",
        b"[" * 50_000,
        b'{"model": "drill"}',
        b'{"model": 5, "prompt": "a"}',
        b'{"model": "drill", "prompt": {}}',
        b'{"model": "drill", "prompt": "\\udc00"}',
        b'{"model": "drill", "prompt": "a", "temperature": NaN}',
        b'{"model": "drill", "prompt": "a", "unheard_of": 1}',
        b'{"model": "drill", "prompt": [1, "a"]}',
        b'{"model": "drill", "prompt": "a", "strategy": "unheard-of"}',
    ]
    bodies += [
        bytes(drill.generator.randrange(256) for _ in range(drill.generator.randint(1, 200)))
        for _ in range(50)
    ]
    answers = [await server.client.ask(body) for body in bodies]
    answers.append(await server.client.ask(b'{"model": "drill", "prompt": "a"}', kind="text/plain"))
    failures = [
        f"{body[:40]!r}: {answer.status}, {answer.code}"
        for body, answer in zip([*bodies, b"text/plain"], answers, strict=True)
        if answer.status not in (400, 415) or answer.code is None
    ]
    after = await server.client.ask(drill.request())
    failures += _all([after], lambda answer: answer.status == 200, "was not answered afterwards")
    drill.judge("malformed", f"{len(answers)} bodies, 50 of them drawn bytes", _codes(answers), failures)


async def context(drill: Drill) -> None:
    """Prompts beyond the context, and models that are not there."""
    server = drill.server()
    asked = [drill.request(prompt="the cat sat " * 5000) for _ in range(20)]
    asked += [drill.request(prompt=[5] * 60_000)]
    long = await asyncio.gather(*(server.client.ask(body) for body in asked))
    failures = _all(long, lambda a: (a.status, a.code) == (400, "context_length_exceeded"), "was not refused")
    unknown = await asyncio.gather(
        *(server.client.ask({**drill.request(), "model": "other"}) for _ in range(20))
    )
    failures += _all(unknown, lambda a: (a.status, a.code) == (404, "model_not_found"), "was not refused")
    failures += _left(await server.client.idle())
    done = f"{len(long)} prompts beyond the context, {len(unknown)} requests for unknown models"
    drill.judge("context, models", done, _codes([*long, *unknown]), failures)


async def overload(drill: Drill) -> None:
    """More requests than the queue holds: 429 with Retry-After for those, the others are served."""
    room = max(8, drill.streams // 8)
    server = drill.server(max_queue=room)
    answers = await asyncio.gather(*(server.client.ask(drill.request()) for _ in range(drill.streams)))
    counts = Counter(answer.status for answer in answers)
    refused = [answer for answer in answers if answer.status == 429]
    failures = [] if set(counts) == {200, 429} else [f"statuses {dict(counts)}"]
    failures += _all(refused, lambda a: a.headers.get("retry-after", "").isdigit(), "has no Retry-After")
    failures += [] if counts[200] >= room else [f"only {counts[200]} were served"]
    figures = await server.client.idle()
    failures += _left(figures)
    waits = sorted(
        {int(answer.headers["retry-after"]) for answer in refused if "retry-after" in answer.headers}
    )
    seen = f"{counts[200]} served, {counts[429]} told to come back after {waits} s"
    drill.judge("overload", f"{drill.streams} requests at a queue of {room}", seen, failures)


async def growth(drill: Drill) -> None:
    """Many requests of every fate leave nothing behind."""
    server = drill.server()

    async def batch(count: int) -> None:
        fates: list[Callable[[], Awaitable[Any]]] = [
            lambda: server.client.ask(drill.request(16)),
            lambda: server.client.ask(drill.request(16, stream=True, logprobs=2)),
            lambda: server.client.ask(drill.request(400, stream=True), leave_after=1500),
            lambda: _leaving(server, drill.request(400), 0.05),
            lambda: server.client.ask(b"{"),
            lambda: server.client.ask(drill.request(prompt="the cat sat " * 3000)),
            lambda: server.client.ask({"input": drill.prompt()}, "/v1/embeddings"),
            lambda: server.client.ask(drill.request(8, echo=True, logprobs=1)),
        ]
        for start in range(0, count, 20):
            await asyncio.gather(*(fates[place % 8]() for place in range(start, min(start + 20, count))))

    await _fill(server)
    await batch(drill.requests // 4)  # what is made once and kept: pools, caches of the tokenizer
    await server.client.idle()
    before = server.status()
    await batch(drill.requests)
    figures = await server.client.idle()
    after = server.status()
    grown = after["memory"] - before["memory"]
    failures = _left(figures)
    failures += [f"memory grew by {grown / 1e6:.1f} MB"] if grown > GROWTH_BYTES else []
    failures += ["threads grew"] if after["threads"] > before["threads"] + 2 else []
    failures += ["open files grew"] if after["files"] > before["files"] + 2 else []
    seen = (
        f"memory {before['memory'] / 1e6:.0f} to {after['memory'] / 1e6:.0f} MB, "
        f"open files {before['files']} to {after['files']}, threads {before['threads']} to "
        f"{after['threads']}; cache blocks in use: {figures['blocks_used']:.0f}"
    )
    drill.judge("growth", f"{drill.requests:,} requests, half of them cancelled or wrong", seen, failures)


async def sigterm(drill: Drill) -> None:
    """SIGTERM while texts are made: they come whole, nothing new is taken, the exit code is 0."""
    server = drill.server()
    bodies = [drill.request(200, stream=place % 2 == 0) for place in range(max(8, drill.streams // 10))]
    tasks = [asyncio.create_task(server.client.ask(body)) for body in bodies]
    while (await server.client.metrics())["running"] < len(bodies) // 2:
        await asyncio.sleep(0.01)
    server.terminate()
    await asyncio.sleep(0.3)
    try:
        refused = (await server.client.ask(drill.request())).status == 0
    except OSError:
        refused = True
    answers = await asyncio.gather(*tasks)
    code = await asyncio.to_thread(server.process.wait, 60)
    failures = _all(answers, lambda a: a.status == 200 and bool(a.text), "was not finished")
    streamed = [answer for answer, body in zip(answers, bodies, strict=True) if body["stream"]]
    failures += _all(streamed, lambda answer: answer.whole, "did not come whole")
    failures += [] if refused else ["a new request was taken"]
    failures += [] if code == 0 else [f"exit code {code}"]
    drill.judge("sigterm", f"SIGTERM while {len(bodies)} texts were made", "all whole; exit code 0", failures)


async def lm_eval(drill: Drill) -> None:
    """The evaluation harness as a client: its log-likelihoods are those of forward passes."""
    done = f"lm_eval --model local-completions on {len(harness.QUESTIONS)} questions, chosen and written"
    command = harness.program()
    if command is None:
        drill.judge("lm_eval", done, "lm_eval is not installed, so this was left out", [])
        return
    from puna.text.pretrained import load

    server, folder = drill.server(dtype="float32"), drill.folder / "lm_eval"
    model = load(drill.model)
    assert model.tokenizer is not None
    folder.mkdir()
    model.tokenizer.save(folder / "tokenizer")
    try:
        await harness.run(command, folder, server.client.port, MODEL, folder / "tokenizer")
    except RuntimeError as error:
        drill.judge("lm_eval", done, "it failed", [str(error)])
        return
    found, expected = harness.log_likelihoods(folder), harness.expected(model)
    pairs = [
        pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)
    ]
    furthest = max(abs(one - other) for one, other in pairs)
    failures = [] if furthest <= harness.NATS else [f"log-likelihoods {furthest:.4f} nats from those here"]
    for (asked, _, _), text in zip(harness.QUESTIONS, harness.written(folder), strict=True):
        body = {"prompt": asked, "max_tokens": harness.TOKENS, "temperature": 0, "stop": ["\n\n"]}
        said = (await server.client.ask(body)).text
        failures += [] if text.strip() == said.strip() else [f"it wrote {text!r}, the server says {said!r}"]
    failures += _left(await server.client.idle())
    seen = (
        f"{len(pairs)} log-likelihoods at most {furthest:.1e} nats from forward passes; "
        f"{harness.chosen_rightly(found)} of {len(found)} questions right"
    )
    drill.judge("lm_eval", done, seen, failures)


CASES: dict[str, Callable[[Drill], Coroutine[Any, Any, None]]] = {
    "streams": streams,
    "slow": slow_readers,
    "disconnects": disconnects,
    "oversized": oversized,
    "malformed": malformed,
    "context": context,
    "overload": overload,
    "growth": growth,
    "sigterm": sigterm,
    "lm_eval": lm_eval,
}


# ---- helpers --------------------------------------------------------------------------------------------


async def _fill(server: Server) -> None:
    """Use every block of the cache once: memory that is touched later is no growth."""
    card = json.loads((await server.client.ask(b"", f"/v1/models/{MODEL}", method="GET")).body)
    length = min(int(card["max_model_len"]), CACHE_TOKENS) - 32
    prompts = [[place + 4] * length for place in range(-(-CACHE_TOKENS // length))]
    await asyncio.gather(*(server.client.ask({"prompt": prompt, "max_tokens": 8}) for prompt in prompts))
    await server.client.idle()


async def _leaving(server: Server, body: dict[str, Any], seconds: float) -> None:
    """Ask and leave after some time, answered or not."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.client.ask(body), seconds)


def _all(answers: Sequence[Answer], holds: Callable[[Answer], bool], says: str) -> list[str]:
    failed = [answer for answer in answers if not holds(answer)]
    if not failed:
        return []
    first = failed[0]
    return [f"{len(failed)} of {len(answers)} {says}: status {first.status}, {first.body[:120]!r}"]


def _left(figures: dict[str, float]) -> list[str]:
    """What the engine holds that it should not, once nothing is asked of it."""
    return [
        f"{name}: {figures[name]:.0f} left" for name in ("running", "waiting", "blocks_used") if figures[name]
    ]


def _codes(answers: Sequence[Answer]) -> str:
    counted = Counter(f"{answer.status} {answer.code}" for answer in answers)
    return ", ".join(f"{count} x {code}" for code, count in sorted(counted.items()))


def drill(
    folder: Path, *, model: str | None, streams: int, requests: int, seed: int, only: Sequence[str]
) -> list[Verdict]:
    """Run the drill in an empty folder and return what became of each case."""
    if model is None:
        tiny_model(folder / "model", positions=1024)
        model = str(folder / "model")
    found = Drill(folder, model, streams, requests, random.Random(seed))
    try:
        for name in only or CASES:
            asyncio.run(CASES[name](found))
            for server in found._servers:
                server.end()
    finally:
        found.close()
    return found.verdicts


def main() -> int:
    """Print the table; 1 if a demand was not met."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--quick", action="store_true", help="40 streams and 300 requests")
    arguments.add_argument("--streams", type=int, help="streams at once (200)")
    arguments.add_argument("--requests", type=int, help="requests that may leave nothing behind (2000)")
    arguments.add_argument("--seed", type=int, default=0, help="of prompts and moments, drawn at random")
    arguments.add_argument("--model", help="an asset or folder; a tiny Llama is made otherwise")
    arguments.add_argument("--only", action="append", choices=CASES, default=[], help="repeatable")
    arguments.add_argument("--llama-server", type=Path, help="llama.cpp's server: compare speeds instead")
    arguments.add_argument("--runs", type=int, default=3, help="of each server, in turn")
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each server")
    given = arguments.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its servers are ended with it
    if given.llama_server is not None:
        from benchmarks.server_peer import compare

        return compare(given.llama_server, runs=given.runs, threads=given.threads)
    streams = given.streams or (40 if given.quick else 200)
    requests = given.requests or (300 if given.quick else 2000)
    with tempfile.TemporaryDirectory(prefix="puna-server-") as folder:
        verdicts = drill(
            Path(folder),
            model=given.model,
            streams=streams,
            requests=requests,
            seed=given.seed,
            only=given.only,
        )
    table = Table("case", "what was done", "what was seen", "verdict", title="server", show_lines=True)
    for verdict in verdicts:
        met = Text("; ".join(verdict.failures), style="red") if verdict.failures else Text("met")
        table.add_row(verdict.case, Text(verdict.done), Text(verdict.seen), met)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    failed = sum(bool(verdict.failures) for verdict in verdicts)
    console.print(f"{len(verdicts) - failed} of {len(verdicts)} met")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
