"""Data-Juicer's mappers of words, sentences and patterns (S50, arXiv:2309.02033).

Words are what stands between spaces, tabs and line breaks. A text that loses a word is put together anew:
one space between words, and neither empty lines nor empty parts between tabs.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pydantic

from puna.core.stage import Parameters
from puna.data.curate.characters import table_of
from puna.data.curate.maps.data_juicer_clean import each
from puna.data.curate.operator import NoSettings, mapper
from puna.data.curate.scores.data_juicer_characters import SOURCE
from puna.data.curate.texts import Texts

_TABLE_ROW = r"(?<=\n)(?:\S+?(?:[ |\t]\S+?){%d}\n+){2,}"
_NOT_COMPARED = re.compile(r"[^a-zA-Z0-9\u4e00-\u9fa5\n\t ]")
_SENTENCE_END = re.compile(r"([.。！!？?])([^’”])")
_ELLIPSIS = re.compile(r"(……)([^’”])")
_QUOTED_END = re.compile(r"([.。！!？?…][’”])([^’”])")
# An end of a sentence: its sign, quotation marks or brackets that close, then space and no small letter.
_END = re.compile(r"(?<=[.!?])([\"'”’)\]]*)[ \t]+(?=[^a-z\s])|(?<=[。！？।॥؟۔])([\"'”’」』)\]]*)[ \t]*(?=\S)")
_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Za-z]|Mrs?|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|cf|al|Fig|No|Vol|Inc|Ltd|Co|Jr|Sr)\.)$"
)


class LongWordSettings(Parameters):
    """Lengths of words that stay."""

    minimum: pydantic.NonNegativeInt = 1
    """Least characters of a word."""
    maximum: pydantic.PositiveInt
    """Most characters of a word."""


class SubstringSettings(Parameters):
    """What words must not hold."""

    substrings: list[str] = pydantic.Field(["http", "www", ".com", "href", "//"], min_length=1)
    """A word that holds one of these is taken out."""


class SentenceSettings(Parameters):
    """How sentences are compared."""

    lower: bool = False
    """Compare without regard to case."""
    ignore_special: bool = True
    """Compare only ASCII's letters and digits, Chinese characters and white space."""
    minimum: pydantic.NonNegativeInt = 2
    """Sentences with fewer characters stay however often they occur."""


class TableSettings(Parameters):
    """Columns of the tables that are taken out."""

    minimum: int = pydantic.Field(2, ge=2, le=20)
    """Least columns."""
    maximum: int = pydantic.Field(20, ge=2, le=20)
    """Most columns."""


class Replacement(Parameters):
    """One pattern and what stands in its place."""

    pattern: str
    """Regular expression; a point matches line breaks too."""
    replacement: str = ""
    r"""What is put there; ``\1`` stands for the first group."""

    @pydantic.model_validator(mode="after")
    def _valid(self) -> Replacement:
        try:
            re.sub(self.pattern, self.replacement, "", flags=re.DOTALL)
        except re.error as error:
            raise ValueError(f"not a regular expression with its replacement: {error}") from None
        return self


class ReplaceSettings(Parameters):
    """What is replaced."""

    replacements: list[Replacement] = pydantic.Field(min_length=1)
    """Patterns, one after the other."""


def kept_words(text: str, keep: Callable[[str], bool]) -> str:
    """The text without the words that ``keep`` refuses, put together anew."""
    lines = []
    for line in text.split("\n"):
        parts = (" ".join(filter(keep, filter(None, part.split(" ")))) for part in line.split("\t"))
        filled = [part for part in parts if part]
        if filled:
            lines.append("\t".join(filled))
    return "\n".join(lines)


def _without_special(word: str) -> str:
    special = table_of("data_juicer_special")
    start, end = 0, len(word)
    while start < end and special[ord(word[start])]:
        start += 1
    while start < end and special[ord(word[end - 1])]:
        end -= 1
    return word[start:end]


@mapper("data_juicer.remove_long_words", settings=LongWordSettings, source=SOURCE)
def remove_long_words(texts: Texts, settings: LongWordSettings) -> list[str | None]:
    """Takes out words whose length is out of bounds, with their special characters and without them."""

    def fits(word: str) -> bool:
        return settings.minimum <= len(word) <= settings.maximum

    return each(texts, lambda text: kept_words(text, lambda word: fits(word) or fits(_without_special(word))))


@mapper("data_juicer.remove_words_with", settings=SubstringSettings, source=SOURCE)
def remove_words_with(texts: Texts, settings: SubstringSettings) -> list[str | None]:
    """Takes out words that hold a substring (``remove_words_with_incorrect_substrings_mapper``).

    Special characters at a word's ends do not count.
    """

    def clean(word: str) -> bool:
        if not any(part in word for part in settings.substrings):
            return True
        inner = _without_special(word)
        return not any(part in inner for part in settings.substrings)

    return each(texts, lambda text: kept_words(text, clean))


@mapper("data_juicer.remove_repeated_sentences", settings=SentenceSettings, source=SOURCE)
def remove_repeated_sentences(texts: Texts, settings: SentenceSettings) -> list[str | None]:
    """Takes out sentences that occurred before in the document (``remove_repeat_sentences_mapper``)."""
    return each(texts, lambda text: _unrepeated(text, settings))


def _unrepeated(text: str, settings: SentenceSettings) -> str:
    seen: set[str] = set()
    lines = []
    for line in text.split("\n"):
        kept = []
        for sentence in _ended(line).split("\n"):
            compared = sentence.strip()
            compared = compared.lower() if settings.lower else compared
            compared = _NOT_COMPARED.sub("", compared) if settings.ignore_special else compared
            if len(compared) < settings.minimum or compared not in seen:
                kept.append(sentence)
            if len(compared) >= settings.minimum:
                seen.add(compared)
        lines.append("".join(kept))
    return "\n".join(lines)


def _ended(line: str) -> str:
    """A line with a break behind each sign that ends a sentence, or behind the quotation mark after it.

    Data-Juicer's class of signs before a quotation mark also holds the digits and braces of repetitions
    that were meant; these end no sentence here.
    """
    for pattern in (_SENTENCE_END, _ELLIPSIS, _QUOTED_END):
        line = pattern.sub(r"\1\n\2", line)
    return line


@mapper("data_juicer.remove_tables", settings=TableSettings, source=SOURCE)
def remove_tables(texts: Texts, settings: TableSettings) -> list[str | None]:
    """Takes out two or more lines in a row that have the same number of words (``remove_table_text_mapper``).

    Words are parted by single spaces, tabs or bars; the first line of a text is never one of a table.
    """
    patterns = [re.compile(_TABLE_ROW % columns) for columns in range(settings.minimum - 1, settings.maximum)]

    def without(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub("", text)
        return text

    return each(texts, without)


@mapper("data_juicer.replace_content", settings=ReplaceSettings, source=SOURCE)
def replace_content(texts: Texts, settings: ReplaceSettings) -> list[str | None]:
    """Replaces what patterns find (``replace_content_mapper``)."""
    pairs = [(re.compile(one.pattern, re.DOTALL), one.replacement) for one in settings.replacements]

    def replaced(text: str) -> str:
        for pattern, replacement in pairs:
            text = pattern.sub(replacement, text)
        return text

    return each(texts, replaced)


@mapper("data_juicer.split_sentences", source=SOURCE)
def split_sentences(texts: Texts, settings: NoSettings) -> list[str | None]:
    """Puts each sentence on a line of its own (``sentence_split_mapper``).

    By rules (a sign that ends a sentence, then space and no small letter; some abbreviations, initials),
    where Data-Juicer has the Punkt models of NLTK.
    """
    return each(texts, _one_a_line)


def _one_a_line(text: str) -> str:
    parts: list[str] = []
    done = 0
    for match in _END.finditer(text):
        end = match.end(1) if match.group(1) is not None else match.end(2)
        if _ABBREVIATION.search(text[max(match.start() - 6, done) : match.start()]):
            continue
        parts.append(text[done:end])
        done = match.end()
    return "\n".join([*parts, text[done:]])
