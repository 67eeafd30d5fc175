"""Chinese and Japanese scripts turned into one another (``chinese_convert_mapper``, S50, arXiv:2309.02033).

The work is OpenCC's, with its dictionaries of phrases: a character may become one of several, by the word
that it stands in. Duplicates in the two scripts of Chinese are found once all are in one.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from puna.core.errors import PunaError
from puna.core.stage import Parameters
from puna.data.curate.maps.data_juicer_clean import each
from puna.data.curate.operator import mapper
from puna.data.curate.scores.data_juicer_characters import SOURCE
from puna.data.curate.texts import Texts

Conversion = Literal[
    "s2t",
    "t2s",
    "s2tw",
    "tw2s",
    "s2hk",
    "hk2s",
    "s2twp",
    "tw2sp",
    "t2tw",
    "tw2t",
    "hk2t",
    "t2hk",
    "t2jp",
    "jp2t",
]
_HAN = re.compile("[\u2e80-\u2fdf\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_HALVES = re.compile("[\ud800-\udfff]")


class ConversionSettings(Parameters):
    """From which script to which."""

    conversion: Conversion = "s2t"
    """s simplified, t traditional as OpenCC writes it, tw and hk as in Taiwan and Hong Kong (with p their
    phrases, too), jp Japanese characters of today; 2 stands for "to"."""


@mapper("data_juicer.chinese_convert", settings=ConversionSettings, source=f"{SOURCE}; OpenCC")
def chinese_convert(texts: Texts, settings: ConversionSettings) -> list[str | None]:
    """Turns simplified Chinese into traditional, or between other scripts (``chinese_convert_mapper``).

    Texts without a Chinese character are left as they are; so are those with half a surrogate pair, which
    are no text to OpenCC.
    """
    converter = _converter(settings.conversion)

    def converted(text: str) -> str:
        if _HAN.search(text) is None or _HALVES.search(text) is not None:
            return text
        return str(converter.convert(text))

    return each(texts, converted)


@lru_cache(maxsize=4)
def _converter(conversion: Conversion) -> Any:
    try:
        import opencc
    except ImportError:
        raise PunaError("this operator needs OpenCC", fix="pip install 'puna[curate]'") from None
    return opencc.OpenCC(conversion)
