"""The Brown corpus as labelled words: sentences with a part of speech for each word."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from puna.core.errors import PunaError
from puna.data.sources.common import Item, PlacedSettings, Reading, asset_or_path, source

_TEXT = re.compile(r"c[a-r]\d\d")
_BASE = re.compile(r"(?:fw-)?([^-+*$]+)")


class BrownSettings(PlacedSettings):
    """A folder of the corpus's texts, named ca01 to cr09, a sentence a line as ``word/tag word/tag``."""

    format: Literal["brown"] = "brown"
    tags: Literal["whole", "base"] = "base"
    """base leaves out of a tag what stands around its first part: that the word is in a title or headline
    (``-tl``, ``-hl``), a genitive (``$``), joined with another (``+``), negated (``*``) or foreign."""

    def default_name(self) -> str:
        """The asset's or the folder's name."""
        return self.asset or Path(self.path or "").name

    def files(self) -> list[Path]:
        """The texts of the folder, unless an asset holds them."""
        return [] if self.path is None else _texts(Path(self.path))


@source(BrownSettings, "labelled_words")
def read_brown(settings: BrownSettings, reading: Reading) -> Iterator[Item]:
    """A text is a source document; each of its lines that is not empty is a row."""
    files = _texts(asset_or_path(settings.asset, settings.path, reading))
    reading.facts["files"] = len(files)
    for file in files:
        if not reading.wants(file.name):
            continue
        number = 0
        for place, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            pairs = [pair.rpartition("/") for pair in line.split()]
            if not pairs:
                continue
            if not all(word and tag for word, _, tag in pairs):
                reading.bad("a word without a tag", where=f"{file.name}:{place}", found=line.strip()[:80])
                continue
            reading.tally.keep()
            labels = [tag if settings.tags == "whole" else base_tag(tag) for _, _, tag in pairs]
            words = [word for word, _, _ in pairs]
            yield Item(file.name, {"words": words, "labels": labels, "language": "en"}, number)
            number += 1


def base_tag(tag: str) -> str:
    """The first part of a tag: ``nn`` of ``nn-tl``, ``fw-nn$``, ``nn+bez``; one of signs alone stays."""
    match = _BASE.match(tag)
    return match[1] if match else tag


def _texts(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("c*") if _TEXT.fullmatch(file.name))
    if not files:
        raise PunaError("none of the Brown corpus's texts is here", where=folder, expected="ca01 to cr09")
    return files
