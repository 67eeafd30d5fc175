"""Pools: nothing lost or doubled, whatever is killed or poisoned; decisions that change without the work."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest

from puna.core.errors import PunaError
from puna.core.stage import Context, validate
from puna.data.corpus import Corpus
from puna.data.curate import curation, layout
from puna.data.curate.account import account, corpus_of
from puna.data.curate.curation import Curation, failures
from puna.data.curate.order import Order
from puna.data.curate.pool import Pool
from puna.data.curate.report import Judged, report_of, trace
from puna.data.curate.settings import CurateParameters
from puna.data.curate.shard import Unit, idle_file, work
from puna.data.ledger import unbalanced
from puna.data.stages import curate

STEPS = [
    {"map": "text.newlines"},
    {"score": "text.sizes"},
    {"gate": {"name": "words", "signal": "text.sizes.words", "minimum": 5}},
    {"global": "order.length"},
    {"gate": {"name": "long half", "signal": "order.length.place", "minimum": 0.5}},
]
SMALL = {"executor": "here", "shard_bytes": 6000, "batch_characters": 2500}
POISON = {"pipeline": [{"score": "poison.words"}], "modules": ["poisonous"]}


@pytest.fixture
def documents(tmp_path):
    draws = random.Random(0)
    texts = [
        " ".join(
            draws.choice(["the", "llama", "and", "puna", "eat", "grass"]) for _ in range(draws.randrange(30))
        )
        + "\r\n" * draws.randrange(2)
        for _ in range(200)
    ]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file, texts


def made(tmp_path, file, name="pool", **changes) -> Pool:
    given = {"sources": [{"path": str(file)}], "pipeline": STEPS, **SMALL, **changes}
    earlier = given.pop("earlier", None)
    return Curation(validate(CurateParameters, given, where="test"), tmp_path / name, earlier).run()


def survivors(pool: Pool, tmp_path, name="corpus") -> list[str]:
    corpus = corpus_of(pool, tmp_path / name, account(pool))
    corpus.verify()
    return list(corpus.texts())


def by_hand(texts, least=5):
    long = [text.replace("\r\n", "\n") for text in texts if len(text.split()) >= least]
    order = sorted(range(len(long)), key=lambda place: len(long[place]))
    kept = {place for rank, place in enumerate(order) if rank / (len(long) - 1) >= 0.5}
    return [text for place, text in enumerate(long) if place in kept]


@pytest.mark.parametrize("changes", [{}, {"short_circuit": False}, {"plan": "recipe"}])
def test_survivors_are_those_of_the_definition(tmp_path, documents, changes):
    file, texts = documents
    pool = made(tmp_path, file, **changes)
    assert len(pool.shards()) > 3
    assert survivors(pool, tmp_path) == by_hand(texts)


def test_the_account_adds_up(tmp_path, documents):
    file, texts = documents
    pool = made(tmp_path, file)
    counts = account(pool)
    told = list(counts.values())
    assert told[0].came == 200
    for before, after in pairwise(told):
        assert before.kept == after.came
        assert after.came == after.kept + after.dropped + after.failed
    assert counts["words"].dropped == sum(len(text.split()) < 5 for text in texts)
    corpus = corpus_of(pool, tmp_path / "corpus", counts)
    assert unbalanced(corpus.meta["ledger"]) is None
    assert corpus.meta["counts"]["rows"] == told[-1].kept
    assert corpus.meta["counts"]["bytes"] == sum(len(text.encode()) for text in corpus.texts())
    assert corpus.meta["counts"]["words"] == sum(len(text.split()) for text in corpus.texts())


def ids_of(pool):
    files = [pool.path / "documents" / f"{shard}.parquet" for shard in pool.shards()]
    return [identity for file in files for identity in layout.read_table(file, ["id"])["id"].to_pylist()]


class Killed(BaseException):
    """A kill between any two files that are written."""


def test_a_run_killed_at_any_place_goes_on_without_loss(tmp_path, documents, monkeypatch):
    file, texts = documents
    whole = survivors(made(tmp_path, file, "whole"), tmp_path, "whole corpus")
    writes = layout.pyarrow.parquet.write_table
    draws = random.Random(1)
    done, kills = None, 0
    while done is None:
        left = draws.randrange(1, 14)  # What needs all shards is done in one go, or again.

        def write(table, place, *args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                place.write_bytes(b"half a file")
                raise Killed
            writes(table, place, *args, **kwargs)

        monkeypatch.setattr(layout.pyarrow.parquet, "write_table", write)
        try:
            done = made(tmp_path, file)
        except Killed:
            kills += 1
    monkeypatch.undo()
    assert kills > 3
    assert survivors(done, tmp_path) == whole == by_hand(texts)
    ids = [
        i
        for s in done.shards()
        for i in layout.read_table(done.path / "documents" / f"{s}.parquet", ["id"])["id"].to_pylist()
    ]
    assert len(ids) == len(set(ids)) == 200
    assert account(done)["read"].came == 200


def test_shards_go_on_as_they_are_read_unless_somebody_is_idle(tmp_path, documents):
    file, _ = documents
    pool = made(tmp_path, file)
    whole = [path.relative_to(pool.path) for path in pool.path.glob("sketch-0-*/*.parquet")]
    assert len(whole) == len(pool.shards()) > 3
    for idle in (False, True):
        for folder in pool.path.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)
        if idle:
            idle_file(pool.path).parent.mkdir()
            idle_file(pool.path).touch()
        work(str(pool.path), Unit("begin", 0, "0"))
        assert len(ids_of(pool)) == 200
        found = [path.relative_to(pool.path) for path in pool.path.glob("*-0-*/*.parquet")]
        assert set(whole) <= set(found) if not idle else not found


def test_other_thresholds_are_decided_without_working_anything_out(tmp_path, documents, monkeypatch):
    file, texts = documents
    first = made(tmp_path, file, short_circuit=False)
    before = {
        path: path.stat().st_mtime_ns for path in first.path.rglob("*.parquet") if "signals-0" in str(path)
    }
    monkeypatch.setattr("puna.data.curate.execute.apply_score", None)
    monkeypatch.setattr("puna.data.curate.execute.apply_map", None)
    again = made(
        tmp_path,
        file,
        "other",
        sources=[],
        short_circuit=False,
        gates={"words": {"minimum": 9}},
        earlier=first.path,
    )
    kept = [path for path in before if (again.path / path.relative_to(first.path)).exists()]
    assert len(kept) == len(before) > 3
    assert survivors(again, tmp_path) == by_hand(texts, least=9)
    assert survivors(first, tmp_path, "first") == by_hand(texts)


@pytest.mark.parametrize("descending", [False, True])
def test_survivors_may_be_written_in_the_order_of_a_signal(tmp_path, documents, descending):
    file, texts = documents
    pool = made(tmp_path, file, pipeline=STEPS[1:3])
    order = Order(signal="text.sizes.words", descending=descending)
    corpus = corpus_of(pool, tmp_path / "corpus", account(pool), order)
    kept = [text for text in texts if len(text.split()) >= 5]
    by_hand = sorted(kept, key=lambda text: len(text.split()), reverse=descending)
    assert list(corpus.texts()) == by_hand
    assert len(corpus.meta["shards"]) == len(pool.shards())
    assert corpus.meta["counts"]["words"] == sum(len(text.split()) for text in kept)
    with pytest.raises(PunaError, match=r"did you mean 'text\.sizes\.words'"):
        corpus_of(pool, tmp_path / "none", account(pool), Order(signal="text.sizes.word"))


def test_quantiles_are_those_of_all_documents(tmp_path, documents):
    file, texts = documents
    steps = [STEPS[1], {"gate": {"name": "best", "signal": "text.sizes.words", "quantile_minimum": 0.9}}]
    kept = survivors(made(tmp_path, file, pipeline=steps), tmp_path)
    words = sorted(len(text.split()) for text in texts)
    bound = next(w for w in words if sum(v <= w for v in words) >= 0.9 * len(words))
    assert kept == [text for text in texts if len(text.split()) >= bound]


@pytest.mark.parametrize("word", ["raise", "endless"])
def test_a_poisoned_document_fails_alone(tmp_path, word):
    texts = [f"document {place} of some" for place in range(40)]
    texts[17] = f"{word} and more"
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pool = made(
        tmp_path, file, pipeline=[{"score": "poison.words"}], modules=["poisonous"], batch_seconds=0.3
    )
    assert survivors(pool, tmp_path) == texts[:17] + texts[18:]
    ((identity, reason),) = failures(pool, pool.shards())
    assert identity.startswith("texts/texts.jsonl:")
    assert ("ZeroDivisionError: poison" if word == "raise" else "of processor time") in reason


@pytest.mark.parametrize("word", ["die", "block"])
def test_a_document_that_kills_its_process_fails_alone(tmp_path, word, monkeypatch):
    monkeypatch.setattr(curation, "_GRACE", 0.5)
    texts = ["document of some", f"{word} and more", "document of others"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pool = made(tmp_path, file, **POISON, batch_seconds=0.5, executor="processes", workers=1)
    assert survivors(pool, tmp_path) == texts[::2]
    assert failures(pool, pool.shards()) == [
        ("texts/texts.jsonl:29", "poison.words: the process died or hung")
    ]


def test_a_step_that_fails_on_most_documents_is_told(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "raise"}\n' * 40)
    with pytest.raises(PunaError, match="fails on most documents"):
        made(tmp_path, file, **POISON)


def test_why_a_document_was_dropped_can_be_told(tmp_path, documents):
    file, texts = documents
    pool = made(tmp_path, file)
    short = next(place for place, text in enumerate(texts) if len(text.split()) < 5)
    ids = [
        i
        for s in pool.shards()
        for i in layout.read_table(pool.path / "documents" / f"{s}.parquet", ["id"])["id"].to_pylist()
    ]
    traced = trace(Pool.open(pool.path), ids[short])
    assert traced.reason == "words"
    assert traced.signals["text.sizes.words"] == len(texts[short].split())
    words = float(len(texts[short].split()))
    assert Judged("words", "text.sizes.words", words, "at least 5", "dropped") in traced.gates
    assert trace(pool, "nobody") is None
    report = {}
    metrics = report_of(pool, account(pool), report)
    assert metrics["documents.read"] == 200
    assert any(row[0] == "words" and "at least 5" in row[3] for row in report["tables"][1]["rows"])


def test_the_stage_leaves_a_corpus_and_a_pool(tmp_path, documents):
    file, texts = documents
    parameters = validate(
        CurateParameters, {"sources": [{"path": str(file)}], "pipeline": STEPS, **SMALL}, where="t"
    )
    outcome = curate(Context("curate", tmp_path / "out", {}), parameters)
    corpus = Corpus.open(outcome.outputs["corpus"], kind="documents")
    assert list(corpus.texts()) == by_hand(texts)
    assert outcome.metrics["documents.kept"] == corpus.count
    again = validate(CurateParameters, {"pipeline": STEPS[:3], **SMALL}, where="t")
    context = Context("again", tmp_path / "again", {"corpus": corpus.path})
    after = Corpus.open(curate(context, again).outputs["corpus"])
    assert Counter(after.texts()) == Counter(corpus.texts())


def test_what_is_wrong_with_the_parameters_is_told(tmp_path):
    with pytest.raises(PunaError, match="two sources are named"):
        source = {"path": "a.jsonl"}
        validate(CurateParameters, {"sources": [source, source], "pipeline": "example"}, where="t")
    with pytest.raises(PunaError, match=r"such as \{include: gopher\}"):
        validate(CurateParameters, {"pipeline": ["gopher"]}, where="t")
    with pytest.raises(PunaError, match="nothing to read"):
        Curation(validate(CurateParameters, {"pipeline": "example"}, where="t"), tmp_path / "pool").run()
    with pytest.raises(PunaError, match="module cannot be imported"):
        made(tmp_path, "a.jsonl", modules=["no_such_module"])
    with pytest.raises(PunaError, match="not a pool"):
        Pool.open(tmp_path)


def test_where_nothing_is_left_it_is_told_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "too short"}\n{"txt": "no text"}\n')
    given = {"sources": [{"path": str(tmp_path / "a.jsonl")}], "pipeline": STEPS, **SMALL}
    with pytest.raises(PunaError) as told:
        curate(Context("c", tmp_path / "out", {}), validate(CurateParameters, given, where="t"))
    for words in ("a.jsonl: no document is left", "2 came", "1 dropped by 'words'", "the first, a/a.jsonl:"):
        assert words in str(told.value)
    assert Pool.open(str(told.value.fix).split()[3]).shards()


RUN = """
import json, pathlib, sys
from puna.core.stage import validate
from puna.data.curate.curation import Curation
from puna.data.curate.settings import CurateParameters
from puna.data.curate.shard import Unit, idle_file, work
Curation(validate(CurateParameters, json.loads(sys.argv[1]), where="test"), pathlib.Path(sys.argv[2])).run()
"""


@pytest.mark.slow
def test_workers_and_their_parent_killed_for_real_lose_nothing(tmp_path, documents):
    file, texts = documents
    given = {"sources": [{"path": str(file)}], "pipeline": STEPS, **SMALL}
    given |= {"executor": "processes", "workers": 2}
    pool = tmp_path / "pool"
    for files in (4, 12, 20):
        command = [sys.executable, "-c", RUN, json.dumps(given), pool]
        process = subprocess.Popen(command, start_new_session=True)
        while process.poll() is None and len(list(pool.glob("*/*.parquet"))) < files:
            time.sleep(0.005)
        assert process.poll() is None, "it was over before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = made(tmp_path, file)
    assert survivors(done, tmp_path) == by_hand(texts)
    assert len(ids_of(done)) == len(set(ids_of(done))) == 200
    assert not list(done.path.rglob(".*.part"))
