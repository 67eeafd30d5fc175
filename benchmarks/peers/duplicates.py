"""Sides of the benchmark of MinHash: the same bands, rows and n-grams of words in lower case for all.

datatrove runs its four steps on its local executor; datasketch, rensa and Daft make signatures and bands,
and what is missing there (n-grams, clusters, the file of survivors) is written out here as one would.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Steps = dict[str, float]


def puna_operator(job: dict[str, Any]) -> Callable[[], Steps]:
    """puna's operator alone, without the pool that the stage ``curate`` keeps of everything."""
    from puna.data.curate.duplicates.in_memory import over_batches
    from puna.data.curate.operator import all_operators
    from puna.data.curate.texts import Texts

    all_operators()

    def run() -> Steps:
        documents: list[dict[str, Any]] = []

        def batches() -> Iterator[Texts]:
            held: list[str] = []
            size = 0
            for document in _documents(job["files"]):
                documents.append(document)
                held.append(document["text"])
                size += len(held[-1])
                if size > 1 << 19:
                    yield Texts(held)
                    held, size = [], 0
            yield Texts(held)

        told = over_batches(
            "dedup.minhash",
            batches(),
            bands=job["bands"],
            rows=job["rows"],
            permutations=job["bands"] * job["rows"],
            ngram=job["ngram"],
            seed=job["seed"],
        )
        duplicate = [flag == 1 for batch in told for flag in batch.signals["duplicate"]]
        _keep(job, documents, (place for place, flag in enumerate(duplicate) if not flag))
        return {}

    return run


def datatrove_minhash(job: dict[str, Any]) -> Callable[[], Steps]:
    """datatrove: signatures, buckets, clusters, filter, with spaCy's words or those of str.split."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.text import TextNormConfig

    config = minhash.MinhashConfig(
        n_grams=job["ngram"],
        num_buckets=job["bands"],
        hashes_per_bucket=job["rows"],
        # Lower case and single spaces alone, so that all sides compare the same words.
        norm_config=TextNormConfig(
            remove_punctuation=False, norm_unicode_diacritics=False, norm_numbers=False
        ),
    )
    folder = Path(job["files"][0]).parent
    out = Path(job["out"])
    reader = JsonlReader(str(folder), glob_pattern="*.jsonl", text_key="text", id_key="id")
    signature = minhash.MinhashDedupSignature(str(out / "signatures"), config=config)
    if job["words"] == "white_space":
        signature.word_tokenizer.word_tokenize = str.split
    else:
        signature.word_tokenizer.word_tokenize("Words are split once before the clock runs.")
    tasks = len(job["files"])
    executors = [
        LocalPipelineExecutor(
            pipeline=steps, tasks=count, workers=job["workers"], logging_dir=str(out / name)
        )
        for name, count, steps in (
            ("1", tasks, [reader, signature]),
            (
                "2",
                job["bands"],
                [minhash.MinhashDedupBuckets(str(out / "signatures"), str(out / "buckets"), config=config)],
            ),
            ("3", 1, [minhash.MinhashDedupCluster(str(out / "buckets"), str(out / "remove"), config=config)]),
            (
                "4",
                tasks,
                [
                    reader,
                    minhash.MinhashDedupFilter(str(out / "remove")),
                    JsonlWriter(str(out / "kept"), compression=None),
                ],
            ),
        )
    ]

    def run() -> Steps:
        steps: Steps = {}
        for executor in executors:
            for step in executor.run().stats:
                steps[step.name] = steps.get(step.name, 0.0) + step.time_stats.total
        return steps

    return run


def datasketch_minhash(job: dict[str, Any]) -> Callable[[], Steps]:
    """datasketch: signatures in bulk with xxhash, and its index with the same bands."""
    import xxhash
    from datasketch import MinHash, MinHashLSH

    permutations = job["bands"] * job["rows"]

    def run() -> Steps:
        documents = list(_documents(job["files"]))
        index = MinHashLSH(num_perm=permutations, params=(job["bands"], job["rows"]))
        clusters = _Clusters(len(documents))
        shared = MinHash(num_perm=permutations, hashfunc=xxhash.xxh32_intdigest)
        for place, document in enumerate(documents):
            members = _members(document["text"], job["ngram"])
            if not members:
                continue
            one = shared.copy()
            one.update_batch([member.encode() for member in members])
            for other in index.query(one):
                clusters.join(place, other)
            index.insert(place, one, check_duplication=False)
        _write(job, documents, clusters)
        return {}

    return run


def rensa_minhash(job: dict[str, Any]) -> Callable[[], Steps]:
    """rensa: signatures of all documents in one call, and its index with the same bands."""
    from rensa import RMinHash, RMinHashLSH

    permutations = job["bands"] * job["rows"]

    def run() -> Steps:
        documents = list(_documents(job["files"]))
        members = [_members(document["text"], job["ngram"]) for document in documents]
        places = [place for place, one in enumerate(members) if one]
        made = RMinHash.from_token_sets([members[place] for place in places], permutations, 1)
        index = RMinHashLSH(job["threshold"], permutations, job["bands"])
        index.insert_many(made)
        clusters = _Clusters(len(documents))
        for place, found in zip(places, index.query_all(made), strict=True):
            for other in found:
                clusters.join(place, places[other])
        _write(job, documents, clusters)
        return {}

    return run


def daft_minhash(job: dict[str, Any]) -> Callable[[], Steps]:
    """Daft: its expression for signatures over its JSON reader, bands joined over numpy."""
    import daft
    import numpy
    from daft.functions import minhash

    bands, rows = job["bands"], job["rows"]

    def run() -> Steps:
        documents = list(_documents(job["files"]))
        plain = [" ".join(document["text"].lower().split()) for document in documents]
        frame = daft.from_pydict({"text": plain})
        made = minhash(daft.col("text"), num_hashes=bands * rows, ngram_size=job["ngram"], seed=1)
        column = frame.select(made.alias("made")).to_arrow().column("made").combine_chunks()
        signature = column.flatten().to_numpy().reshape(len(documents), -1)
        clusters = _Clusters(len(documents))
        few = [text.count(" ") + 1 < job["ngram"] for text in plain]
        for band in range(bands):
            keys = numpy.ascontiguousarray(signature[:, band * rows : (band + 1) * rows])
            first: dict[bytes, int] = {}
            for place, key in enumerate(keys.view(f"V{4 * rows}").reshape(-1).tolist()):
                if not few[place]:
                    clusters.join(place, first.setdefault(key, place))
        _write(job, documents, clusters)
        return {}

    return run


def _documents(files: Iterable[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def _members(text: str, size: int) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[start : start + size]) for start in range(len(words) - size + 1)]


class _Clusters:
    """Union-find; the first document of a cluster is its name."""

    def __init__(self, count: int) -> None:
        self.first = list(range(count))

    def of(self, place: int) -> int:
        while self.first[place] != place:
            self.first[place] = self.first[self.first[place]]
            place = self.first[place]
        return place

    def join(self, one: int, other: int) -> None:
        one, other = self.of(one), self.of(other)
        self.first[max(one, other)] = min(one, other)


def _write(job: dict[str, Any], documents: list[dict[str, Any]], clusters: _Clusters) -> None:
    _keep(job, documents, (place for place in range(len(documents)) if clusters.of(place) == place))


def _keep(job: dict[str, Any], documents: list[dict[str, Any]], places: Iterable[int]) -> None:
    folder = Path(job["out"]) / "kept"
    folder.mkdir(parents=True)
    with open(folder / "0.jsonl", "w", encoding="utf-8") as file:
        for place in places:
            file.write(json.dumps(documents[place], ensure_ascii=False) + "\n")


SIDES = {
    "puna operator": puna_operator,
    "datatrove minhash": datatrove_minhash,
    "datasketch minhash": datasketch_minhash,
    "rensa minhash": rensa_minhash,
    "daft minhash": daft_minhash,
}
