"""What is in a corpus, for people: counts, languages, sources, lengths, first rows, and what was dropped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from puna.data.corpus import Corpus
from puna.data.kinds import texts_of
from puna.data.leak import LeakCheck

_BAR = 40
_SHOWN_CHARACTERS = 400


def describe(corpus: Corpus, *, rows: int = 3) -> list[RenderableType]:
    """Tables and the first ``rows`` rows of a corpus, to be printed in order. Reads the corpus once."""
    lengths: Counter[int] = Counter()
    first: list[dict[str, Any]] = []
    for row in corpus.rows():
        if len(first) < rows:
            first.append(row)
        words = sum(len(text.split()) for text in texts_of(corpus.kind, row))
        lengths[words.bit_length()] += 1
    parts: list[RenderableType] = [_head(corpus), _groups(corpus, "source"), _groups(corpus, "language")]
    if corpus.kind.startswith("labelled"):
        parts.append(_labels(corpus))
    parts += [_histogram(lengths), rich_table(drops_table({"": corpus}))]
    return parts + [_shown(corpus, row) for row in first]


def _head(corpus: Corpus) -> Table:
    counts = corpus.meta["counts"]
    table = Table(title=str(corpus.path), show_header=False)
    facts = {
        "kind": corpus.kind,
        "rows": f"{counts['rows']:,}",
        "words": f"{counts['words']:,}",
        "bytes": f"{counts['bytes']:,}",
        "licences": ", ".join(corpus.meta["licences"]),
        "fingerprint": corpus.fingerprint,
    }
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _groups(corpus: Corpus, by: str) -> Table:
    table = Table(by, "rows", "words", "bytes")
    for name, counts in corpus.meta[f"{by}s"].items():
        table.add_row(name, *(f"{counts[unit]:,}" for unit in ("rows", "words", "bytes")))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _labels(corpus: Corpus) -> Table:
    table = Table("label", "times")
    table.columns[1].justify = "right"
    for name in corpus.labels:
        table.add_row(Text(name), f"{corpus.meta['labels'][name]:,}")
    return table


def _histogram(lengths: Mapping[int, int]) -> Table:
    table = Table("words in a row", "rows", "")
    most = max(lengths.values(), default=1)
    for bits in range(min(lengths, default=0), max(lengths, default=-1) + 1):
        low, high = (1 << bits) >> 1, (1 << bits) - 1
        count = lengths.get(bits, 0)
        bar = "█" * round(_BAR * count / most)
        table.add_row(f"{low:,}" if low >= high else f"{low:,} to {high:,}", f"{count:,}", bar)
    return table


def _shown(corpus: Corpus, row: Mapping[str, Any]) -> Panel:
    body = Text()
    for field, value in row.items():
        if field in ("id", "source"):
            continue
        if isinstance(value, str):
            lines = [(field, value)]
        elif isinstance(value[0], str):
            lines = [(field, " ".join(value))]
        else:
            lines = [(m["role"], m["content"]) for m in value]
        for label, text in lines:
            cut = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
            body.append(f"{label}: ", style="bold")
            body.append(f"{cut}\n")
    body.rstrip()
    return Panel(body, title=Text(row["id"]), title_align="left")


def counts_table(corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """Rows, words and bytes by side and source, as a table for the report."""
    rows = []
    for side, corpus in corpora.items():
        for name, counts in corpus.meta["sources"].items():
            rows.append([side, name, counts["rows"], counts["words"], counts["bytes"]])
        total = corpus.meta["counts"]
        rows.append([side, "all", total["rows"], total["words"], total["bytes"]])
    return {"title": "Corpus", "columns": ["side", "source", "rows", "words", "bytes"], "rows": rows}


def drops_table(corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """What each step read, kept and dropped, as a table for the report."""
    rows = []
    for side, corpus in corpora.items():
        for name, tally in corpus.meta["ledger"].items():
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in tally["dropped"].items())
            step = f"{side} {name}".strip()
            rows.append([step, tally["unit"], tally["read"], tally["kept"], reasons])
    return {
        "title": "Read, kept, dropped",
        "columns": ["step", "unit", "read", "kept", "dropped"],
        "rows": rows,
    }


def leak_table(leak: LeakCheck) -> dict[str, Any]:
    """What the leak check found, with examples, as a table for the report."""
    rows = [["all", "", f"{leak.leaking} of {leak.checked:,} training rows, {leak.runs:,} held-out runs"]]
    rows += [[example["train"], example["held_out"], example["words"]] for example in leak.examples]
    title = f"Leak check: {leak.size} words in a row"
    return {"title": title, "columns": ["training row", "held-out row", "shared words"], "rows": rows}


def rich_table(table: Mapping[str, Any]) -> Table:
    """A table of the report, for a terminal."""
    drawn = Table(*table["columns"], title=table["title"])
    for row in table["rows"]:
        drawn.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    return drawn


def metrics(corpora: Mapping[str, Corpus], leak: LeakCheck) -> dict[str, float]:
    """Rows, words and bytes by side, drops by reason, and what leaked, by dotted names."""
    found: dict[str, float] = {}
    for side, corpus in corpora.items():
        for unit, count in corpus.meta["counts"].items():
            found[f"{unit}.{side}"] = count
        dropped: Counter[str] = Counter()
        for tally in corpus.meta["ledger"].values():
            dropped.update(tally["dropped"])
        for reason, count in sorted(dropped.items()):
            found[f"dropped.{side}.{re.sub(r'[^a-z0-9]+', '_', reason.lower())}"] = count
    if "held_out" in corpora:
        found["leak.checked"] = leak.checked
        found["leak.rows"] = leak.leaking
    return found
