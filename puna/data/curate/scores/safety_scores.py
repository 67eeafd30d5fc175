"""Personal data and unwanted words as signals.

Which words are unwanted is the user's to say: a file with one a line, or the asset ``profanity-words``, a
list of English ones. There is no classifier: those of alt-profanity-check are pickles, which puna does
not open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate.operator import Signals, Spans, score
from puna.data.curate.pii import KINDS, Kind, find
from puna.data.curate.segments import ratio
from puna.data.curate.texts import Texts
from puna.data.curate.wordlists import hashes_of_list


class PiiSettings(Parameters):
    """What is looked for."""

    kinds: list[Kind] = list(KINDS)  # noqa: RUF012  (pydantic copies defaults)
    """email, iban, card, ip, phone, mac, key."""


class UnwantedSettings(Parameters):
    """Which words."""

    words: str
    """File with one word a line, a JSON file (a list, or lists by language), or the asset
    profanity-words. Case does not matter, and phrases of several words are never found."""
    language: str | None = None
    """Which list of a JSON file with lists by language; "all" for all of them."""


@score(
    "pii.found",
    settings=PiiSettings,
    signals={
        "count": "what was found of all kinds",
        "email": "e-mail addresses",
        "iban": "account numbers with right check digits",
        "card": "card numbers with a right check digit",
        "ip": "addresses of IPv4 and IPv6",
        "phone": "telephone numbers",
        "mac": "addresses of network cards",
        "key": "secret keys",
    },
    spans={"kind": "place of the kind in: email, iban, card, ip, phone, mac, key"},
    version=2,
    source="ISO 13616 and ISO 7064 (accounts), ISO/IEC 7812 (cards)",
)
def pii(texts: Texts, settings: PiiSettings) -> Signals:
    """How much personal data a document holds, and where."""
    kinds = tuple(settings.kinds)
    rows = [
        (place, start, end, KINDS.index(kind))
        for place, text in enumerate(texts.texts)
        for start, end, kind in find(text, kinds)
    ]
    document, starts, ends, found = numpy.array(rows, dtype=numpy.int64).reshape(-1, 4).T
    counts: dict[str, NDArray[Any]] = {
        kind: numpy.bincount(document[found == place], minlength=texts.count)
        for place, kind in enumerate(KINDS)
    }
    total = numpy.bincount(document, minlength=texts.count)
    return {"count": total, **counts, "kind": Spans(document, starts, ends, found.astype(numpy.float64))}


@score(
    "toxicity.words",
    settings=UnwantedSettings,
    signals={"count": "words of the list", "ratio": "words of the list by words; null without words"},
    source="a list of words that the user gives",
)
def unwanted_words(texts: Texts, settings: UnwantedSettings) -> Signals:
    r"""How many of a document's words (runs of letters, digits and _) are on a list."""
    words = texts.lower.words("word")
    count = words.total(words.among(hashes_of_list(Path(settings.words), settings.language)))
    return {"count": count, "ratio": ratio(count, words.counts)}
