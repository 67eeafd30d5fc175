"""RedPajama-V2's signals of content: brackets, filler text, stop words, and two lists (arXiv:2411.12372).

The two lists are others' and are not part of puna: bad words (LDNOOBW) as a folder of ``LANGUAGE.txt``
files with one entry a line, and categories of domains (UT1) as a JSON file of numbers by domain. Without
its list a signal is null. Stop words are puna's own short lists of function words unless a folder of such
files is given; RedPajama's are those of stopwords-json, which are longer, so shares differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.core.stage import Parameters
from puna.data.curate import matching
from puna.data.curate.operator import Signals, score
from puna.data.curate.redpajama_texts import normalised, normalised_lengths, normalised_words, rounded
from puna.data.curate.segments import ratio
from puna.data.curate.stop_words import STOP_WORDS
from puna.data.curate.texts import Texts, hashes_of

_FILLER = re.compile(r"lorem[ \n]+ipsum")


class ContentSettings(Parameters):
    """Lists that a user gives."""

    bad_words: Path | None = None
    """Folder of files LANGUAGE.txt, one word or phrase a line in lower case. None: the signal is null."""
    stop_words: Path | None = None
    """Folder of files LANGUAGE.txt, one word a line. None: puna's own lists (en, de, es, fr, it)."""
    domains: Path | None = None
    """JSON file of category numbers by domain. None: the signal is null."""
    language: str = "en"
    """Language code of documents whose language is not known."""


@score(
    "redpajama.content",
    settings=ContentSettings,
    signals={
        "rps_doc_curly_bracket": "curly brackets per character; 0 for an empty text",
        "rps_doc_ldnoobw_words": "words and phrases that are on the list of bad words; null without a list",
        "rps_doc_lorem_ipsum": "occurrences of lorem ipsum per normalised character; 0 for an empty text",
        "rps_doc_stop_word_fraction": "share of raw words that are stop words, as written; null without list",
        "rps_doc_ut1_blacklist": "number of the domain's category; null if it has none",
    },
    source="arXiv:2411.12372",
)
def content(texts: Texts, settings: ContentSettings) -> Signals:
    """Curly brackets, lorem ipsum, stop words, bad words and the domain's category."""
    brackets = matching.occurrences(texts, "{", "}")
    plain = normalised(texts)
    filler = numpy.array([len(_FILLER.findall(text)) if "lorem" in text else 0 for text in plain.texts])
    return {
        "rps_doc_curly_bracket": rounded(ratio(brackets, numpy.maximum(texts.lengths, 1))),
        "rps_doc_ldnoobw_words": _by_language(texts, settings, _bad_words, settings.bad_words),
        "rps_doc_lorem_ipsum": rounded(ratio(filler, numpy.maximum(normalised_lengths(texts), 1))),
        "rps_doc_stop_word_fraction": _by_language(texts, settings, _stop_words, settings.stop_words),
        "rps_doc_ut1_blacklist": _categories(texts, settings.domains),
    }


CountOf = Callable[[Texts, str, "Path | None"], "NDArray[numpy.float64] | None"]


def _by_language(
    texts: Texts, settings: ContentSettings, count: CountOf, folder: Path | None
) -> NDArray[numpy.float64]:
    """[count] what ``count`` says of the documents of each language; null where it has no list."""
    languages = numpy.array([language or settings.language for language in texts.languages], dtype=object)
    result = numpy.full(texts.count, numpy.nan)
    for language in sorted(set(languages)):
        values = count(texts, language, folder)
        if values is not None:
            result = numpy.where(languages == language, values, result)
    return result


def _stop_words(texts: Texts, language: str, folder: Path | None) -> NDArray[numpy.float64] | None:
    entries = STOP_WORDS.get(language) if folder is None else words_of(folder, language)
    if entries is None:
        return None
    raw = texts.words("word_punct")
    share = raw.mean(matching.among_few(raw, matching.hashes_of_words(tuple(entries))))
    # Without a normalised word the share is 0, which is not null.
    return rounded(numpy.where(normalised_words(texts).counts == 0, 0.0, share))


def _bad_words(texts: Texts, language: str, folder: Path | None) -> NDArray[numpy.float64] | None:
    entries = None if folder is None else words_of(folder, language)
    if entries is None:
        return None
    words = normalised_words(texts)
    counts = numpy.zeros(texts.count)
    for n, hashes in _phrases(tuple(entries)).items():
        grams = words.ngrams(n)
        counts += grams.total(matching.among_few(grams, hashes))
    return counts


@cache
def _phrases(entries: tuple[str, ...]) -> Mapping[int, NDArray[numpy.uint64]]:
    """Hashes of phrases by how many words they have, as n-grams of words are hashed."""
    by_length: dict[int, list[str]] = {}
    for entry in sorted(set(entries)):
        by_length.setdefault(entry.count(" ") + 1, []).append(entry)
    return {
        n: hashes_of(phrases) if n == 1 else Texts(phrases).words("white_space").ngrams(n).hashes
        for n, phrases in by_length.items()
    }


@cache
def words_of(folder: Path, language: str) -> tuple[str, ...] | None:
    """Entries of a language's file, or None if the folder has none for it."""
    if not folder.is_dir():
        raise PunaError("no folder of word lists", where=folder, expected="files such as en.txt")
    file = folder / f"{language}.txt"
    if not file.is_file():
        return None
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


@cache
def _domains(file: Path) -> dict[str, float]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return {str(domain): float(number) for domain, number in table.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise PunaError(
            "no table of domains", where=file, found=str(error), expected='JSON such as {"a.com": 3}'
        ) from None


def _categories(texts: Texts, file: Path | None) -> NDArray[numpy.float64]:
    if file is None:
        return numpy.full(texts.count, numpy.nan)
    table = _domains(file)
    return numpy.array([table.get(urlsplit(url).netloc, numpy.nan) for url in texts.urls], dtype=float)
