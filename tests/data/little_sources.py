"""Helpers of the tests of this room."""

import json
from collections.abc import Iterable
from typing import Any

from puna.core.stage import Outcome
from puna.data.corpus import Corpus
from puna.data.sources import Item

HEADER = 'msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=UTF-8\\n"\n'


def entry(original: str, translation: str, *before: str) -> str:
    """One message of a .po file; ``before`` are comment lines."""
    quoted = [json.dumps(text, ensure_ascii=False) for text in (original, translation)]
    return "\n".join([*before, f"msgid {quoted[0]}", f"msgstr {quoted[1]}", ""])


def po(*entries: str, header: str = HEADER) -> str:
    return "\n".join([header, *entries])


def rows_of(outcome: Outcome, side: str = "train") -> list[dict[str, Any]]:
    return list(Corpus.open(outcome.outputs[side]).rows())


def texts(items: Iterable[Item]) -> list[str]:
    return [item.row["text"] for item in items]
