"""Data-Juicer's mappers of single characters: Unicode, punctuation, white space, unwanted characters.

S50, arXiv:2309.02033. What a character becomes is that of modelscope/data-juicer, its slip included: the
full-width digit 1 becomes a quotation mark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy

from puna.core.errors import PunaError
from puna.core.stage import Parameters
from puna.data.curate import special  # noqa: F401  (registers classes of characters)
from puna.data.curate.characters import table_of
from puna.data.curate.maps.data_juicer_clean import each
from puna.data.curate.operator import NoSettings, mapper
from puna.data.curate.scores.data_juicer_characters import SOURCE
from puna.data.curate.texts import Texts

_PUNCTUATION = {
    ",": "，、",
    ".": "。",
    '"': "„”“«»１」「《》",
    "'": "´’",
    ":": "∶：",
    "?": "？",
    "!": "！",
    "(": "（",
    ")": "）",
    ";": "；",
    "-": "–━►",
    " - ": "—",
    ". ": "．",
    "~": "～",
    "...": "…",
    "<": "〈",
    ">": "〉",
    "[": "【",
    "]": "】",
    "%": "％",
}
_REPLACED = [(mark, new) for new, marks in _PUNCTUATION.items() for mark in marks]
_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_PRINTABLE = re.compile(r"[\n\x20-\x7e\t]*")
# What ftfy takes as a sign of a wrong decoding holds two characters beyond ASCII in a row, or one of the
# others; entities and breaks of lines need its work by line too.
_DOUBTFUL = re.compile(r"[^\x00-\x7f]{2}|[\x80-\x9f\u0152\u0153\xc3\xc2]|[&\r\u2028\u2029]")


class UnicodeSettings(Parameters):
    """How text is normalised."""

    form: Literal["NFC", "NFKC", "NFD", "NFKD"] = "NFC"
    """Normal form of Unicode."""


class CharacterSettings(Parameters):
    """Which characters."""

    characters: str = "◆●■►▼▲▴∆▻▷❖♡□"
    """Characters that are taken out."""


class ChineseSettings(Parameters):
    """What stays besides Chinese characters."""

    keep_alphabet: bool = True
    """Keep ASCII's letters."""
    keep_number: bool = True
    """Keep ASCII's digits."""
    keep_punctuation: bool = True
    """Keep spaces and some punctuation."""


def replaced(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The text with single characters replaced, none of which is among what others become.

    To look for each is faster than to look at every character: most are in no text at all.
    """
    for mark, new in pairs:
        if mark in text:
            text = text.replace(mark, new)
    return text


@mapper("data_juicer.punctuation", source=SOURCE)
def punctuation(texts: Texts, settings: NoSettings) -> list[str | None]:
    """Replaces punctuation of other scripts by ASCII's (``punctuation_normalization_mapper``)."""
    changed: list[str | None] = [None] * texts.count
    for place, text in enumerate(texts.texts):
        if not text.isascii():
            made = replaced(text, _REPLACED)
            changed[place] = made if made is not text else None
    return changed


@mapper("data_juicer.white_space", source=SOURCE)
def white_space(texts: Texts, settings: NoSettings) -> list[str | None]:
    """Strips texts, and makes tabs and Unicode's other spaces plain ones; line breaks stay.

    As ``whitespace_normalization_mapper``; spaces are replaced one by one and not merged.
    """
    changed: list[str | None] = [None] * texts.count
    for place, text in enumerate(texts.texts):
        made = text.strip()
        made = made.replace("\t", " ")
        if not made.isascii():
            made = replaced(made, _SPACES)
        if made is not text and made != text:
            changed[place] = made
    return changed


_SPACES = [(chr(code), " ") for code in numpy.flatnonzero(table_of("data_juicer_white_space")) if code > 127]


@mapper("data_juicer.fix_unicode", settings=UnicodeSettings, source=SOURCE)
def fix_unicode(texts: Texts, settings: UnicodeSettings) -> list[str | None]:
    """Repairs text that was decoded wrongly and normalises it, by ftfy (``fix_unicode_mapper``).

    ftfy works line by line: lines of printable ASCII without entities of HTML come out as they are, and
    are not given to it.
    """
    repair = _ftfy()
    changed: list[str | None] = [None] * texts.count
    for place, text in enumerate(texts.texts):
        if not _is_plain(text):
            made = _repaired(text, settings.form, repair)
            changed[place] = made if made != text else None
    return changed


def _is_plain(text: str) -> bool:
    """Whether ftfy leaves a text as it is: printable ASCII, tabs, line breaks, no entities of HTML."""
    return _PRINTABLE.fullmatch(text) is not None and ("&" not in text or _ENTITY.search(text) is None)


def _repaired(text: str, form: str, ftfy: Any) -> str:
    lines = text.split("\n")
    calm = [n for n, line in enumerate(lines) if not line.isascii() and _DOUBTFUL.search(line) is None]
    if calm:
        # Nothing in these lines looks wrongly decoded, and what else is repaired is so character by
        # character: one call does for all of them.
        joined = "\n".join(lines[place] for place in calm)
        config = ftfy.TextFixerConfig(normalization=form, fix_encoding=False, unescape_html=False)
        made = ftfy.fix_text_segment(joined, config)
        if _DOUBTFUL.search(made) is None and made.count("\n") == len(calm) - 1:
            for place, line in zip(calm, made.split("\n"), strict=True):
                lines[place] = line
        else:
            calm = []
    return _line_by_line(lines, frozenset(calm), form, ftfy)


def _line_by_line(lines: list[str], done: frozenset[int], form: str, ftfy: Any) -> str:
    config = ftfy.TextFixerConfig(normalization=form)
    made: list[str] = []
    for place, line in enumerate(lines):
        if config.unescape_html and "<" in line:
            # As in the library: entities of HTML are decoded up to the first line with a tag.
            config = config._replace(unescape_html=False)
        whole = line if place == len(lines) - 1 else line + "\n"
        plain = place in done or _is_plain(line)
        made.append(whole if plain else ftfy.fix_text(whole, config))
    return "".join(made)


def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError:
        raise PunaError("this operator needs ftfy", fix="pip install 'puna[curate]'") from None
    return ftfy


@mapper("data_juicer.remove_characters", settings=CharacterSettings, source=SOURCE)
def remove_characters(texts: Texts, settings: CharacterSettings) -> list[str | None]:
    """Takes out single characters (``remove_specific_chars_mapper``).

    Data-Juicer joins them with | inside a class, and so takes out the character | too; here it stays.
    """
    table = {ord(character): None for character in settings.characters}
    found = set(settings.characters)
    changed: list[str | None] = [None] * texts.count
    for place, text in enumerate(texts.texts):
        if not found.isdisjoint(text):
            changed[place] = text.translate(table)
    return changed


@mapper("data_juicer.chinese_only", settings=ChineseSettings, source=SOURCE)
def chinese_only(texts: Texts, settings: ChineseSettings) -> list[str | None]:
    """Takes out all but Chinese characters and what is chosen (``remove_non_chinese_character_mapper``)."""
    kept = "\u4e00-\u9fa5"
    kept += "A-Za-z" if settings.keep_alphabet else ""
    kept += "0-9" if settings.keep_number else ""
    kept += re.escape(".， ,-。%《*》/•、&＆(—)（+）：？!！“”·") if settings.keep_punctuation else ""
    pattern = re.compile(f"[^{kept}]+")
    return each(texts, lambda text: pattern.sub("", text))
