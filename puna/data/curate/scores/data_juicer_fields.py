"""Data-Juicer's scores of fields beside the text, tokens and chunks (S50, arXiv:2309.02033).

Fields are those that a reader kept of a row beside its text (``meta``), named with dots inside one
another; ``id``-like ones of puna's own are ``language`` and ``url``. A score never drops a document: gates
do, with ``specified_field.target`` of at least 1, or bounds on ``specified_number.value``.
"""

from __future__ import annotations

import re

import numpy
import pydantic

from puna.core.stage import Parameters
from puna.data.curate.fields import field_values, number_of
from puna.data.curate.operator import Signals, Spans, score
from puna.data.curate.scores.data_juicer_characters import SOURCE, or_zero
from puna.data.curate.texts import Texts
from puna.data.curate.tokens import token_counts


class TokenizerSettings(Parameters):
    """Which tokenizer."""

    tokenizer: str
    """A file tokenizer.json, a model's folder or an asset."""


class FieldSettings(Parameters):
    """Which field, and what it is to be."""

    field: str
    """Name of the field, with dots for what is inside another."""
    values: list[str | float | bool | None] = pydantic.Field(min_length=1)
    """Values that are wanted; of a list in the field, every one has to be among them."""


class NumberSettings(Parameters):
    """Which field."""

    field: str
    """Name of the field, with dots for what is inside another."""


class SuffixSettings(Parameters):
    """Endings of file names."""

    suffixes: list[str] = pydantic.Field(min_length=1)
    """Wanted endings, with the dot."""
    field: str = "url"
    """Field with the name of the file."""


class ChunkSettings(Parameters):
    """Where a text is cut."""

    maximum: pydantic.PositiveInt | None = None
    """Most characters of a chunk."""
    pattern: str | None = r"\n\n"
    """Regular expression at which chunks end, the last one before the maximum; null: at the maximum alone."""
    overlap: pydantic.NonNegativeInt = 0
    """Characters that a chunk repeats of the one before, where no pattern was found."""

    @pydantic.model_validator(mode="after")
    def _some(self) -> ChunkSettings:
        if self.maximum is None and self.pattern is None:
            raise ValueError("give a maximum, a pattern or both")
        if self.maximum is not None and self.overlap >= self.maximum:
            raise ValueError("the overlap is smaller than the maximum")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return self


@score("data_juicer.tokens", settings=TokenizerSettings, signals={"count": "tokens"}, source=SOURCE)
def token_number(texts: Texts, settings: TokenizerSettings) -> Signals:
    """Tokens of a document, without special ones (``token_num_filter``)."""
    return {"count": token_counts(texts, settings.tokenizer)}


@score(
    "data_juicer.alphabetic_tokens",
    settings=TokenizerSettings,
    signals={"ratio": "letters by tokens"},
    source=SOURCE,
)
def alphabetic_tokens(texts: Texts, settings: TokenizerSettings) -> Signals:
    """Letters of a document by its tokens: ``alphanumeric_filter`` with ``tokenization``, another score."""
    return {"ratio": or_zero(texts.count_of("alphabetic"), token_counts(texts, settings.tokenizer))}


@score(
    "data_juicer.specified_field",
    settings=FieldSettings,
    signals={"target": "1 if the field is as wanted, else 0; null without the field"},
    source=SOURCE,
)
def specified_field(texts: Texts, settings: FieldSettings) -> Signals:
    """Whether a field has one of the wanted values (``specified_field_filter``)."""
    wanted = settings.values
    result = numpy.full(texts.count, numpy.nan)
    for place, (present, value) in enumerate(field_values(texts, settings.field)):
        if present:
            given = value if isinstance(value, list) else [value]
            result[place] = all(_among(one, wanted) for one in given)
    return {"target": result}


def _among(value: object, wanted: list[str | float | bool | None]) -> bool:
    # True is no 1 here: JSON tells them apart.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in wanted)


@score(
    "data_juicer.specified_number",
    settings=NumberSettings,
    signals={"value": "the field's number; null without one"},
    source=SOURCE,
)
def specified_number(texts: Texts, settings: NumberSettings) -> Signals:
    """A number that stands in a field, as a number or in digits (``specified_numeric_field_filter``)."""
    numbers = (number_of(value) for _, value in field_values(texts, settings.field))
    return {"value": numpy.fromiter(numbers, numpy.float64, texts.count)}


@score(
    "data_juicer.suffix",
    settings=SuffixSettings,
    signals={"target": "1 if the name ends as wanted, else 0"},
    source=SOURCE,
)
def suffix(texts: Texts, settings: SuffixSettings) -> Signals:
    """Whether the file that a document came from has one of the wanted endings (``suffix_filter``)."""
    endings = tuple(settings.suffixes)
    names = (str(value) if present else "" for present, value in field_values(texts, settings.field))
    ends = (name.split("?")[0].split("#")[0].endswith(endings) for name in names)
    return {"target": numpy.fromiter(ends, numpy.float64, texts.count)}


@score(
    "data_juicer.chunks",
    settings=ChunkSettings,
    signals={"count": "chunks"},
    spans={"characters": "characters of each chunk"},
    source=SOURCE,
)
def chunks(texts: Texts, settings: ChunkSettings) -> Signals:
    """Where a text is cut into chunks (``text_chunk_mapper``).

    Data-Juicer makes each chunk a row of its own. Here documents stay whole and chunks are spans of them;
    the pattern between two chunks belongs to neither.
    """
    found = [list(_chunks(text, settings)) for text in texts.texts]
    counts = numpy.fromiter(map(len, found), numpy.int64, texts.count)
    places = numpy.array([pair for pairs in found for pair in pairs], dtype=numpy.int64).reshape(-1, 2)
    document = numpy.repeat(numpy.arange(texts.count), counts)
    starts, ends = places[:, 0], places[:, 1]
    return {"count": counts, "characters": Spans(document, starts, ends, (ends - starts).astype(float))}


def _chunks(text: str, settings: ChunkSettings) -> list[tuple[int, int]]:
    if settings.maximum is None:
        return _split(text, str(settings.pattern))
    if settings.pattern is None:
        step = settings.maximum - settings.overlap
        if len(text) <= settings.maximum:
            return [(0, len(text))]
        return [(at, min(at + settings.maximum, len(text))) for at in range(0, len(text), step)]
    cuts: list[tuple[int, int]] = []
    start = 0
    while len(text) - start > settings.maximum:
        window = text[start : start + settings.maximum]
        last = None
        for last in re.finditer(settings.pattern, window):  # noqa: B007  (the last one is wanted)
            pass
        if last is None or last.end() == 0:
            cuts.append((start, start + settings.maximum))
            start += settings.maximum - settings.overlap
        else:
            cuts.append((start, start + last.start()))
            start += last.end()
    return [*cuts, (start, len(text))]


def _split(text: str, pattern: str) -> list[tuple[int, int]]:
    """What lies between the matches, where that is more than white space."""
    cuts: list[tuple[int, int]] = []
    start = 0
    for match in re.finditer(pattern, text):
        cuts.append((start, match.start()))
        start = match.end()
    cuts.append((start, len(text)))
    return [(a, b) for a, b in cuts if text[a:b].strip()]
