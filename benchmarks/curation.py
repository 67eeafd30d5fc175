"""Curation: puna and its peers over the same documents, in turn, shard by shard.

    python -m benchmarks.curation [WORK ...] [--shards 8] [--first 0] [--workers 2] [--peers /path/to/python]

Peers live in environments of their own: one with ``pip install datatrove[processing] spacy datasketch rensa
daft``, given as ``--peers`` or ``PUNA_PEERS``, and one with ``pip install py-data-juicer==1.6.1 aiohttp ftfy
fasttext-community``, given as ``--data-juicer`` or ``PUNA_DATA_JUICER``: the path of its interpreter.
Every figure is a fresh process that reads JSON lines,
filters, and writes the survivors. What is compared is documents per second of processor time, which others
at work on the machine change little; wall time is told beside it. Both sides take one shard after another
in turns, so that a change of the machine's pace meets both. Survivors are compared text by text. With
``--kept FILE`` what was measured is kept there, so that a long measurement may be made in parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.curation_texts import FOLDER, shards
from puna.core import assets
from puna.data.curate.languages import LID
from puna.data.curate.pipeline import PRESETS

SIDE = Path(__file__).parent / "peers" / "curation.py"
LISTED = FOLDER.parent / "curation-words.json"


@dataclass(frozen=True)
class Work:
    """What is done by puna's pipeline and by each peer, given what the peer's side needs to know."""

    name: str
    says: str
    pipeline: Any
    peers: dict[str, dict[str, Any]]


@dataclass
class Row:
    """What one side took in all, over its shards."""

    documents: int = 0
    bytes: int = 0
    seconds: float = 0.0
    processor: float = 0.0
    peak: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    survivors: Counter[bytes] = field(default_factory=Counter)


DATATROVE = {
    "datatrove": {"side": "datatrove", "words": "spacy"},
    "datatrove, str.split": {"side": "datatrove", "words": "white_space"},
}
BANDS = {"bands": 14, "rows": 8, "ngram": 5, "threshold": 0.7}


def _without_duplicates() -> list[dict[str, Any]]:
    """The steps of ``data-juicer-refine-cc`` but for its near-duplicates, with a list of words to count."""
    preset = yaml.safe_load((PRESETS / "data-juicer-refine-cc.yaml").read_text(encoding="utf-8"))
    steps: list[dict[str, Any]] = []
    for step in preset["steps"]:
        if step.get("score") == "data_juicer.flagged_words":
            step = {**step, "settings": {"words": str(LISTED), "language": "en"}}
        if "gate" in step:  # In YAML the key null is no string.
            step = {"gate": {key or "null": value for key, value in step["gate"].items()}}
        if "global" not in step and not str(step.get("gate", {}).get("signal")).startswith("dedup."):
            steps.append(step)
    return steps


def _data_juicer() -> dict[str, dict[str, Any]]:
    """The same recipe for py-data-juicer: words between white space, no perplexity, one list of words."""
    LISTED.parent.mkdir(parents=True, exist_ok=True)
    # Words that stand in few documents of these: what is counted is the same work as for any list.
    LISTED.write_text(json.dumps({"en": ["fool", "fools", "idiot", "stupid", "viagra"]}), encoding="utf-8")
    english = {"lang": "en", "tokenization": False}
    recipe: list[dict[str, dict[str, Any]]] = [
        {"clean_email_mapper": {}},
        {"clean_links_mapper": {}},
        {"fix_unicode_mapper": {}},
        {"punctuation_normalization_mapper": {}},
        {"whitespace_normalization_mapper": {}},
        {"alphanumeric_filter": {"min_ratio": 0.7508, "max_ratio": 0.8591}},
        {"average_line_length_filter": {"max_len": 1500}},
        {"character_repetition_filter": {"rep_len": 10, "max_ratio": 0.3}},
        {"flagged_words_filter": {**english, "max_ratio": 0.0015}},
        {"language_id_score_filter": {"min_score": 0.793}},
        {"maximum_line_length_filter": {"max_len": 5000}},
        {"special_characters_filter": {"min_ratio": 0.15, "max_ratio": 0.35}},
        {"text_length_filter": {"max_len": 58187}},
        {"words_num_filter": {**english, "min_num": 20, "max_num": 11529}},
        {"word_repetition_filter": {**english, "rep_len": 10, "max_ratio": 0.2962}},
    ]
    job = {"side": "data_juicer", "recipe": recipe, "words": str(LISTED), "model": str(assets.fetch(LID))}
    return {"py-data-juicer": {**job, "fused": False}, "py-data-juicer, fused": {**job, "fused": True}}


WORKS = [
    Work(
        "minhash",
        "near-duplicates: 14 bands of 8 rows, members of 5 words in lower case, the first of a cluster kept",
        [
            {
                "global": "dedup.minhash",
                "settings": {"bands": 14, "rows": 8, "permutations": 112, "ngram": 5, "threshold": 0.7},
            },
            {"gate": {"name": "near", "signal": "dedup.minhash.duplicate", "maximum": 0, "null": "keep"}},
        ],
        {
            "puna, operator alone": {"side": "puna operator", "seed": 1, **BANDS},
            "puna, another seed": {"side": "puna operator", "seed": 2, **BANDS},
            "datatrove": {"side": "datatrove minhash", "words": "spacy", **BANDS},
            "datatrove, str.split": {"side": "datatrove minhash", "words": "white_space", **BANDS},
            "datasketch": {"side": "datasketch minhash", **BANDS},
            "rensa": {"side": "rensa minhash", **BANDS},
            "daft": {"side": "daft minhash", **BANDS},
        },
    ),
    Work(
        "gopher",
        "Gopher's quality and repetition rules as datatrove reads them",
        str(Path(__file__).parent / "curation_gopher.yaml"),
        DATATROVE,
    ),
    Work(
        "dclm",
        "DCLM-Baseline's rules about pages, with its own counts, at the same thresholds",
        "dclm-pages",
        DATATROVE,
    ),
    Work(
        "data-juicer",
        "Data-Juicer's English recipe (Common Crawl 2023-06) without near-duplicates and perplexity",
        _without_duplicates(),
        _data_juicer(),
    ),
]


def main() -> None:
    """Run the works and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", nargs="*", default=[work.name for work in WORKS])
    parser.add_argument("--first", type=int, default=0, help="the first shard that is measured")
    parser.add_argument("--shards", type=int, default=len(shards()))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peers", default=os.environ.get("PUNA_PEERS"))
    parser.add_argument("--data-juicer", default=os.environ.get("PUNA_DATA_JUICER"))
    parser.add_argument("--without", nargs="*", default=[], help="sides that are left out")
    parser.add_argument("--kept", type=Path, help="file of what was measured, read and written")
    given = parser.parse_args()
    done = Kept(given.kept)
    files = shards()[given.first : given.first + given.shards]
    for work in (work for work in WORKS if work.name in given.works):
        peers = {"datatrove": given.peers, "data_juicer": given.data_juicer}
        left = {name: side for name, side in work.peers.items() if name not in given.without}
        work = dataclasses.replace(work, peers=left)
        show(work, run(work, files, given.workers, peers, done))


class Kept:
    """What was measured, by side and files: works may share peers, and a file remembers."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.rows: dict[str, Row] = {}
        if file is not None and file.is_file():
            self.rows = {key: _row(row) for key, row in json.loads(file.read_text("utf-8")).items()}

    def add(self, key: str, row: Row) -> None:
        self.rows[key] = row
        if self.file is not None:
            told = {
                name: {**vars(kept), "survivors": {text.hex(): n for text, n in kept.survivors.items()}}
                for name, kept in self.rows.items()
            }
            self.file.write_text(json.dumps(told), encoding="utf-8")


def _row(told: dict[str, Any]) -> Row:
    survivors = Counter({bytes.fromhex(text): n for text, n in told["survivors"].items()})
    return Row(**{**told, "steps": Counter(told["steps"]), "survivors": survivors})


def run(
    work: Work, files: list[Path], workers: int, peers: dict[str, str | None], done: Kept
) -> dict[str, Row]:
    """All sides over all files in turns."""
    sides = {"puna": {"side": "puna", "pipeline": work.pipeline}}
    sides |= {
        name: settings
        for name, settings in work.peers.items()
        if name.startswith("puna") or peers.get(settings["side"], peers["datatrove"])
    }
    rows = {name: Row() for name in sides}
    for file in _groups(files, workers):
        for name, settings in sides.items():
            key = json.dumps([settings, workers, *(part.name for part in file)], sort_keys=True)
            if key not in done.rows:
                of_side = peers.get(settings["side"], peers["datatrove"])
                interpreter = sys.executable if name.startswith("puna") else str(of_side)
                done.add(key, measure(interpreter, settings, file, workers))
            _add(rows[name], done.rows[key])
    return rows


def _groups(files: list[Path], workers: int) -> Iterator[list[Path]]:
    for at in range(0, len(files), workers):
        yield files[at : at + workers]


def measure(interpreter: str, settings: dict[str, Any], files: list[Path], workers: int) -> Row:
    """One side over some files in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "in").mkdir()
        for file in files:
            (place / "in" / file.name).symlink_to(file)
        job = {
            **settings,
            "files": [str(place / "in" / file.name) for file in files],
            "out": str(place / "out"),
            "workers": workers,
        }
        (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [interpreter, str(SIDE), str(place / "job.json"), str(place / "result.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        if interpreter != sys.executable:
            environment.pop("PYTHONPATH", None)
        made = subprocess.run(command, env=environment, capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(f"{settings['side']} failed:\n{made.stderr[-3000:]}")
        result = json.loads((place / "result.json").read_text(encoding="utf-8"))
        sizes = [file.stat().st_size for file in files]
        lines = sum(file.read_bytes().count(b"\n") for file in files)
        return Row(
            lines,
            sum(sizes),
            result["seconds"],
            result["processor"],
            result["peak"],
            Counter(result["steps"]),
            Counter(_survivors(place / "out")),
        )


def _survivors(folder: Path) -> Iterator[bytes]:
    """Hashes of the texts that a side has kept, out of JSON lines or parquet below its folder."""
    for file in sorted((folder / "kept").glob("**/*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            yield from (_hash(json.loads(line)["text"]) for line in lines)
    for file in sorted((folder / "corpus").glob("**/*.parquet")):
        import pyarrow.parquet

        column = pyarrow.parquet.read_table(file, columns=["text"]).column("text")
        yield from map(_hash, column.to_pylist())


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _add(row: Row, other: Row) -> None:
    row.documents += other.documents
    row.bytes += other.bytes
    row.seconds += other.seconds
    row.processor += other.processor
    row.peak = max(row.peak, other.peak)
    row.steps += other.steps
    row.survivors += other.survivors


def show(work: Work, rows: dict[str, Row]) -> None:
    """Print what each side took, how many times longer than puna, and whose survivors are whose."""
    from rich.console import Console
    from rich.table import Table

    puna = rows["puna"]
    table = Table(title=f"{work.name}: {work.says}; {puna.documents} documents, {puna.bytes / 1e6:.0f} MB")
    for heading in ("", "docs/s per core", "MB/s per core", "times", "wall s", "peak MB", "kept", "as puna"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in rows.items():
        same = (row.survivors & puna.survivors).total() / max((row.survivors | puna.survivors).total(), 1)
        table.add_row(
            name,
            f"{row.documents / row.processor:.0f}",
            f"{row.bytes / 1e6 / row.processor:.2f}",
            f"{row.processor / puna.processor:.2f}",
            f"{row.seconds:.1f}",
            f"{row.peak / 1e6:.0f}",
            str(row.survivors.total()),
            f"{same:.2%}",
        )
    console = Console(width=140)
    console.print(table)
    for name, row in rows.items():
        steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in row.steps.items())
        console.print(f"{name}: {steps}")


if __name__ == "__main__":
    main()
