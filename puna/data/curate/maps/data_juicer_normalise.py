"""Data-Juicer's mappers of single characters: Unicode, punctuation, white space, unwanted characters.

S50, arXiv:2309.02033. What a character becomes is that of modelscope/data-juicer, its slip included: the
full-width digit 1 becomes a quotation mark.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
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
# others; entities, breaks of lines and control characters need its work by line too.
_DOUBTFUL = re.compile(
    r"[^\x00-\x7f]{2}|[\x80-\x9f\u0152\u0153\xc3\xc2\ud800-\udfff]|[&\u2028\u2029\x00-\x08\x0b-\x1f\x7f]"
)
_BEYOND = re.compile(r"[^\x00-\x7f]")


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
    if _DOUBTFUL.search(text) is None:
        made = _by_character(text, form, ftfy)
        if made is not None:
            return made
    lines = text.split("\n")
    calm = [n for n, line in enumerate(lines) if not line.isascii() and _DOUBTFUL.search(line) is None]
    made = _by_character("\n".join(lines[place] for place in calm), form, ftfy)
    done = {} if made is None or not calm else dict(zip(calm, made.split("\n"), strict=True))
    return _line_by_line(lines, done, form, ftfy)


def _by_character(text: str, form: str, ftfy: Any) -> str | None:
    """A text in which nothing looks wrongly decoded, repaired character by character.

    None where that cannot be told of a character alone, or where the outcome looks wrongly decoded.
    """
    beyond = False
    for character in set(_BEYOND.findall(text)):
        new = _alone(character, form, ftfy)
        if new is None:
            return None
        if new != character:
            text = text.replace(character, new)
            beyond = beyond or not new.isascii()
    return None if beyond and _DOUBTFUL.search(text) is not None else text


@lru_cache(maxsize=1 << 16)
def _alone(character: str, form: str, ftfy: Any) -> str | None:
    """What a character becomes between others of ASCII; None for those that join with what is before."""
    if unicodedata.category(character)[0] == "M":
        return None
    config = ftfy.TextFixerConfig(normalization=form, fix_encoding=False, unescape_html=False)
    made = ftfy.fix_text_segment(f"a{character}a", config)
    return made[1:-1] if made[:1] == "a" and made[-1:] == "a" else None


def _line_by_line(lines: list[str], done: Mapping[int, str], form: str, ftfy: Any) -> str:
    config = ftfy.TextFixerConfig(normalization=form)
    made: list[str] = []
    for place, line in enumerate(lines):
        if config.unescape_html and "<" in line:
            # As in the library: entities of HTML are decoded up to the first line with a tag.
            config = config._replace(unescape_html=False)
        ending = "" if place == len(lines) - 1 else "\n"
        if place in done:
            made.append(done[place] + ending)
        else:
            made.append(line + ending if _is_plain(line) else ftfy.fix_text(line + ending, config))
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
