"""The same units of work as tasks of a real Ray on this machine, with two workers."""

from __future__ import annotations

import json

import pytest

from puna.core.stage import validate
from puna.data.curate.account import account, corpus_of
from puna.data.curate.curation import Curation, failures
from puna.data.curate.settings import CurateParameters

pytest.importorskip("ray", exc_type=ImportError)

STEPS = [
    {"score": "poison.words"},
    {"score": "text.sizes"},
    {"gate": {"name": "words", "signal": "text.sizes.words", "minimum": 2}},
    {"global": "order.length"},
    {"gate": {"name": "long half", "signal": "order.length.place", "minimum": 0.5}},
]


@pytest.mark.slow
def test_survivors_are_those_of_one_process_and_a_killed_worker_costs_one_document(tmp_path):
    texts = ["word " * (place % 7) for place in range(16)]
    texts[9] = "die of it"
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    kept = {}
    for executor in ("ray", "here"):
        if executor == "here":  # A death would be that of the tests.
            file.write_text(file.read_text().replace("die of it", "raise  it"))
        given = {"sources": [{"path": str(file)}], "pipeline": STEPS, "modules": ["poisonous"]}
        given |= {"executor": executor, "workers": 2, "shard_bytes": 1000, "plan": "recipe"}
        pool = Curation(validate(CurateParameters, given, where="test"), tmp_path / executor).run()
        kept[executor] = list(corpus_of(pool, tmp_path / f"{executor} corpus", account(pool)).texts())
        (failed,) = failures(pool, pool.shards())
        assert failed[0].startswith("texts/texts.jsonl:")
        assert len(pool.shards()) > 1
    assert kept["ray"] == kept["here"]
    assert len(kept["ray"]) > 3
