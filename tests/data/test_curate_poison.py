"""A pool with one of everything poisonous in it: each fails alone, is listed, and costs little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow

GOOD = [f"A good document, number {number}, of a few words." for number in range(6)]
RUN = """
import json, pathlib, resource, sys
from puna.core.stage import validate
from puna.data.curate.account import account, corpus_of
from puna.data.curate.curation import Curation, failures
from puna.data.curate.operator import all_operators
from puna.data.curate.settings import CurateParameters

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

all_operators()
parameters = validate(CurateParameters, json.loads(sys.argv[1]), where="test")
before = peak()
pool = Curation(parameters, pathlib.Path(sys.argv[2]) / "pool").run()
grown = peak() - before
counts = account(pool)
corpus = corpus_of(pool, pathlib.Path(sys.argv[2]) / "corpus", counts)
told = {"failed": failures(pool, pool.shards()), "kept": list(corpus.texts()), "grown": grown}
told["read"] = [counts["read"].came, counts["read"].failed]
print(json.dumps(told))
"""


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def poisoned(folder: Path) -> list[str]:
    """A line of 200 MB, one that is not UTF-8, an endless search, and a bomb, between good ones."""
    with (folder / "a.jsonl").open("wb") as stream:
        stream.write(line(GOOD[0]))
        stream.write(b'{"text": "')
        for _ in range(200):
            stream.write(b"x" * 1_000_000)
        stream.write(b'"}\n')
        stream.write(line(GOOD[1]))
        stream.write(b'{"text": "\xff\xfe"}\n')
        stream.write(line(GOOD[2]) + line("endless and more") + line(GOOD[3]))
    with pyarrow.CompressedOutputStream(str(folder / "b.jsonl.zst"), "zstd") as stream:
        stream.write(line(GOOD[4]))
        for _ in range(40):  # 400 MB out of some 40 kB
            stream.write(bytes(10_000_000))
    (folder / "c.jsonl").write_bytes(line(GOOD[5]))
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.zst", "c.jsonl")]


def test_each_poison_fails_alone_within_bounds_of_memory(tmp_path):
    given = {
        "sources": [{"path": path} for path in poisoned(tmp_path)],
        "pipeline": [{"score": "poison.words"}],
        "modules": ["poisonous"],
        "executor": "here",
        "batch_seconds": 0.3,
    }
    path = [str(Path(__file__).parent), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{RUN}", json.dumps(given), tmp_path],
        capture_output=True,
        check=True,
        text=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kept"] == GOOD
    reasons = [reason for _, reason in told["failed"]]
    assert len(reasons) == len({identity for identity, _ in told["failed"]}) == 4
    assert reasons[0] == "larger than 16,777,216 bytes"
    assert reasons[1].startswith("not UTF-8")
    assert "of processor time" in reasons[2]
    assert reasons[3] == "the file unpacks to more than 268,435,456 bytes"
    assert told["read"] == [10, 3]
    # A reader holds twice the largest document, and never a line of 200 MB or what the bomb unpacks to.
    assert told["grown"] < 180_000_000
