"""Data-Juicer's mappers of single characters: Unicode, punctuation, white space, unwanted characters.

S50, arXiv:2309.02033. What a character becomes is that of modelscope/data-juicer, its slip included: the
full-width digit 1 becomes a quotation mark.
"""

from __future__ import annotations

import re
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
_REPLACED = str.maketrans({mark: new for new, marks in _PUNCTUATION.items() for mark in marks})
_PLAIN = re.compile(r"[\n\x20-\x25\x27-\x7e\t]*")


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


@mapper("data_juicer.punctuation", source=SOURCE)
def punctuation(texts: Texts, settings: NoSettings) -> list[str | None]:
    """Replaces punctuation of other scripts by ASCII's (``punctuation_normalization_mapper``)."""
    changed: list[str | None] = [None] * texts.count
    for place, text in enumerate(texts.texts):
        if not text.isascii():
            made = text.translate(_REPLACED)
            changed[place] = made if made != text else None
    return changed


@mapper("data_juicer.white_space", source=SOURCE)
def white_space(texts: Texts, settings: NoSettings) -> list[str | None]:
    """Strips texts, and makes tabs and Unicode's other spaces plain ones; line breaks stay.

    As ``whitespace_normalization_mapper``; spaces are replaced one by one and not merged.
    """
    changed: list[str | None] = [None] * texts.count
    for place, text in enumerate(texts.texts):
        made = text.strip()
        if not made.isascii():
            made = made.translate(_SPACES)
        elif "\t" in made:
            made = made.replace("\t", " ")
        if made is not text:
            changed[place] = made
    return changed


_SPACES = {int(code): " " for code in numpy.flatnonzero(table_of("data_juicer_white_space"))}


@mapper("data_juicer.fix_unicode", settings=UnicodeSettings, source=SOURCE)
def fix_unicode(texts: Texts, settings: UnicodeSettings) -> list[str | None]:
    """Repairs text that was decoded wrongly and normalises it, by ftfy (``fix_unicode_mapper``).

    ftfy works line by line: lines of printable ASCII without ``&`` come out as they are, and are not given
    to it.
    """
    repair = _ftfy()
    changed: list[str | None] = [None] * texts.count
    for place, text in enumerate(texts.texts):
        if _PLAIN.fullmatch(text) is None:
            made = _repaired(text, settings.form, repair)
            changed[place] = made if made != text else None
    return changed


def _repaired(text: str, form: str, ftfy: Any) -> str:
    config = ftfy.TextFixerConfig(normalization=form)
    lines = text.split("\n")
    for place, line in enumerate(lines):
        if config.unescape_html and "<" in line:
            # As in the library: entities of HTML are decoded up to the first line with a tag.
            config = config._replace(unescape_html=False)
        if _PLAIN.fullmatch(line) is None:
            last = place == len(lines) - 1
            # With its break, as a line is given to the library's functions otherwise too.
            lines[place] = ftfy.fix_text(line if last else line + "\n", config)
        elif place < len(lines) - 1:
            lines[place] = line + "\n"
    return "".join(lines)


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
