"""Setu's statistics, on which its flags stand (S60, arXiv:2403.06350).

Definitions are those of AI4Bharat/setu's ``filters.py``; its limits by language are data, in the presets
``setu`` and ``setu-ocr``. What it calls lines are stretches up to a full stop, a question or exclamation
mark, a danda, a bar, or Urdu's marks, with the line breaks behind these; a line's length is in words, which
are what single spaces part. Its single-document flagger stores the repetition of characters under another
name than it reads, so that that flag never holds; here it does.
"""

from __future__ import annotations

from pathlib import Path

import numpy

from puna.core.stage import Parameters
from puna.data.curate import special  # noqa: F401  (registers classes of characters)
from puna.data.curate.characters import Table, character_class, table_from
from puna.data.curate.counting import character_ngrams, word_ngrams
from puna.data.curate.maps.setu_clean import SOURCE
from puna.data.curate.operator import NoSettings, Signals, score
from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts, lines, words
from puna.data.curate.wordlists import hashes_of_list

_PUNCTUATION = "।॥\uaaf1\uaaf0\uabeb\uabec\uabed\uabee\uabef\u1c7e\u1c7f"


@character_class("setu_delimiter")
def _delimiter() -> Table:
    """Where Setu's lines end."""
    return table_from(".?!।|॥؟۔")


@character_class("indic_punctuation")
def _punctuation() -> Table:
    """ASCII's punctuation and that of Indic scripts: tokens of their own."""
    return table_from(_PUNCTUATION, (0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E))


@lines("setu")
def _lines(texts: Texts) -> Segments:
    """Stretches that end with a delimiter and the line breaks behind it, and what is left behind the last."""
    delimiters = numpy.flatnonzero(texts.is_class("setu_delimiter"))
    breaks = texts.runs(texts.is_class("newline"))
    # The breaks that begin right behind a delimiter belong to its line.
    after = numpy.searchsorted(breaks.starts, delimiters + 1)
    follows = numpy.append(breaks.starts, -1)[after] == delimiters + 1
    document = numpy.searchsorted(texts.bounds, delimiters, side="right") - 1
    same = numpy.append(breaks.document, -1)[after] == document
    ends = numpy.where(follows & same, numpy.append(breaks.ends, 0)[after], delimiters + 1)
    stops = numpy.sort(numpy.concatenate([ends, texts.bounds[1:]]))
    owners = numpy.sort(numpy.concatenate([document, numpy.arange(texts.count)]))
    # Stops and owners stay in step: stops of a document lie within its bounds, its own end last.
    starts = numpy.empty_like(stops)
    starts[1:] = stops[:-1]
    first = numpy.searchsorted(owners, numpy.arange(texts.count))
    starts[first] = texts.bounds[:-1]
    found = Segments(texts, starts, stops, owners)
    numbers = (found.count_in(texts.is_class("digit")) == found.lengths) & (found.lengths > 0)
    return found.where(~numbers)


@words("indic")
def _words(texts: Texts) -> Segments:
    """What spaces and tabs part, with every punctuation mark a word of its own, save those in numbers.

    As Indic NLP's trivial tokenizer, which also joins numbers around marks that have spaces beside them.
    """
    codes = texts.codes
    solid = (codes != 32) & (codes != 9)
    single = texts.is_class("indic_punctuation")
    digit = (codes >= 48) & (codes <= 57)
    inside = numpy.zeros(len(codes), dtype=bool)
    if len(codes) > 2:
        between = numpy.isin(codes[1:-1], [ord(mark) for mark in ",.:/"])
        inside[1:-1] = between & digit[:-2] & digit[2:]
        inside[texts.bounds[:-1][texts.lengths > 0]] = False
        inside[texts.bounds[1:][texts.lengths > 0] - 1] = False
    single = single & ~inside
    begins, finishes = solid.copy(), solid.copy()
    begins[1:] &= ~solid[:-1] | single[1:] | single[:-1]
    finishes[:-1] &= ~solid[1:] | single[1:] | single[:-1]
    filled = texts.lengths > 0
    begins[texts.bounds[:-1][filled]] = solid[texts.bounds[:-1][filled]]
    finishes[texts.bounds[1:][filled] - 1] = solid[texts.bounds[1:][filled] - 1]
    return Segments(texts, numpy.flatnonzero(begins), numpy.flatnonzero(finishes) + 1)


@score("setu.symbols", signals={"ratio": "symbols by characters; null without characters"}, source=SOURCE)
def symbols(texts: Texts, settings: NoSettings) -> Signals:
    """Share of characters that are no digit, space, line break, Latin, Indic or Arabic letter."""
    return {"ratio": ratio(texts.lengths - texts.count_of("setu_valid"), texts.lengths)}


@score(
    "setu.statistics",
    signals={
        "lines": "lines, what is left behind the last delimiter among them; lines of digits left out",
        "mean_line_words": "words of a line; null without lines",
        "characters": "characters",
        "other_scripts": "share of characters that are no Latin, Indic or Arabic ones, punctuation or space",
        "word_repetition": "share of 5-grams of words that occur more than once; null without one",
        "character_repetition": "share of 10-grams of characters that are among the most frequent; null",
    },
    source=SOURCE,
)
def statistics(texts: Texts, settings: NoSettings) -> Signals:
    """What Setu's flags are made of.

    The most frequent 10-grams are as many as the square root of the number of different ones, repeated or
    not: a text of 100 characters that all differ scores about 0.1.
    """
    found = texts.lines("setu")
    ngrams = word_ngrams(texts.words("indic"), 5)
    runs = character_ngrams(texts, 10)
    k = numpy.sqrt(runs.distinct).astype(numpy.int64)
    return {
        "lines": found.counts,
        "mean_line_words": found.mean(found.count_in(texts.codes == 32) + 1),
        "characters": texts.lengths,
        "other_scripts": ratio(texts.lengths - texts.count_of("setu_latin_indic"), texts.lengths),
        "word_repetition": ratio(ngrams.in_repeated(), ngrams.total),
        "character_repetition": ratio(runs.in_top(k), runs.total),
    }


class ListSettings(Parameters):
    """Which words."""

    words: str
    """File with one word a line, a JSON file (a list, or lists by language), or an asset."""
    language: str | None = None
    """Which list of a JSON file with lists by language; "all" for all of them."""


@score(
    "setu.flagged_words",
    settings=ListSettings,
    signals={"ratio": "words of the list by words that spaces part; null for an empty text"},
    source=SOURCE,
)
def flagged_words(texts: Texts, settings: ListSettings) -> Signals:
    """Share of words that are on a list of the user's (Setu's NSFW ratio; off in its configurations)."""
    found = texts.lower.words("word")
    listed = found.total(found.among(hashes_of_list(Path(settings.words), settings.language)))
    spaces = texts.total(texts.codes == 32)
    return {"ratio": ratio(listed, numpy.where(texts.lengths > 0, spaces + 1, 0))}
