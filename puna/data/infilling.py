"""The work of the stage ``infill``: documents with their middle last, drawn anew for every epoch (S46).

Of each epoch exactly the share ``rate`` of the documents is put in another order, and exactly the share
``spm`` of these in SPM, which ones is drawn: the authors draw each document for itself, whose shares would
scatter around these. Every document stays one row, so nothing is put in another order across documents, and
every row is undone again before it is written: one that is not the document to the character is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from puna.core.errors import PunaError
from puna.core.seeds import derive, numpy_generator
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus, write_corpus
from puna.data.describe import counts_table, drops_table
from puna.data.ledger import Ledger
from puna.data.settings import InfillParameters
from puna.text.infill import Markers, Order, order_of, permute, restore


def run(context: Context, parameters: InfillParameters) -> Outcome:
    """Write every document once for each epoch, and count what became of it."""
    source = Corpus.open(context.inputs["corpus"], kind="documents")
    seed = derive(context.seed if parameters.seed is None else parameters.seed, context.name)
    markers = Markers(*parameters.markers)
    ledger = Ledger()
    written = write_corpus(
        context.out / "corpus",
        "documents",
        _rows(source, parameters, markers, ledger, seed),
        provenance=source.meta["provenance"],
        ledger=ledger,
    )
    tables = [counts_table({"infilled": written}), drops_table({"infilled": written})]
    context.report.setdefault("tables", []).extend(tables)
    return Outcome({"corpus": written.path}, _figures(source, written, markers))


def orders(count: int, parameters: InfillParameters, seed: int, epoch: int) -> list[Order | None]:
    """The order of each of ``count`` documents in an epoch; None leaves it alone."""
    chosen = round(parameters.rate * count)
    in_spm = round(parameters.spm * chosen)
    found: list[Order | None] = [None] * count
    drawn = numpy_generator(seed, "infill", "orders", epoch).permutation(count)[:chosen]
    for number, place in enumerate(drawn.tolist()):
        found[place] = "spm" if number < in_spm else "psm"
    return found


def _rows(
    source: Corpus, parameters: InfillParameters, markers: Markers, ledger: Ledger, seed: int
) -> Iterator[dict[str, Any]]:
    good = [markers.found_in(row["text"]) is None for row in source.rows()]
    for epoch in range(parameters.epochs):
        tally = ledger.step(f"epoch {epoch}", "documents")
        turn = iter(orders(sum(good), parameters, seed, epoch))
        generator = numpy_generator(seed, "infill", "cuts", epoch)
        for row, is_good in zip(source.rows(), good, strict=True):
            if not is_good:
                tally.drop("holds a marker")
                continue
            tally.keep()
            text, order = str(row["text"]), next(turn)
            first, second = sorted(generator.integers(0, len(text) + 1, size=2).tolist())
            made = text if order is None else permute(text, (first, second), order, markers)
            if restore(made, markers) != text:
                raise PunaError("a document cannot be put back together", where=row["id"])
            yield {**row, "id": f"{row['id']}@{epoch}", "text": made}


def _figures(source: Corpus, written: Corpus, markers: Markers) -> dict[str, float]:
    """Shares as they are in what was written, and whether it is the documents again, read anew."""
    originals = {str(row["id"]): _digest(row["text"]) for row in source.rows()}
    rows = infilled = in_spm = wrong = again = 0
    first: dict[str, bytes] = {}
    repeated = 0
    for row in written.rows():
        rows += 1
        name, _, epoch = str(row["id"]).rpartition("@")
        order = order_of(row["text"], markers)
        infilled += order is not None
        in_spm += order == "spm"
        wrong += _digest(restore(row["text"], markers)) != originals[name]
        if epoch == "0":
            first[name] = _digest(row["text"])
        elif order is not None:
            again += 1
            repeated += first[name] == _digest(row["text"])
    return {
        "rows": float(rows),
        "rate": infilled / rows,
        "spm": in_spm / infilled if infilled else 0.0,
        "not_restored": float(wrong),
        "same_again": repeated / again if again else 0.0,
    }


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
