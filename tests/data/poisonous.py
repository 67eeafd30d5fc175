"""Operators that misbehave on documents that hold certain words; imported by the workers of tests."""

from __future__ import annotations

import os
import re
import time

from puna.data.curate.operator import NoSettings, Signals, score
from puna.data.curate.texts import Texts

_ENDLESS = re.compile(r"(a+)+b")


@score("poison.words", signals={"length": "characters"}, source="none")
def words(texts: Texts, settings: NoSettings) -> Signals:
    """Raises, hangs in a regular expression, blocks or dies, as a document's first word says."""
    for text in texts.texts:
        if text.startswith("raise"):
            raise ZeroDivisionError("poison")
        if text.startswith("endless"):
            _ENDLESS.search("a" * 40)
        if text.startswith("block"):
            time.sleep(600)
        if text.startswith("die"):
            os._exit(9)
    return {"length": texts.lengths}
