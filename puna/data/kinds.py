"""The kinds of corpora: which columns a row has, and the check that a row is one of its kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from puna.core.errors import PunaError

Kind = Literal["documents", "messages", "preferences", "sentence_pairs", "labelled_texts", "labelled_words"]
Shape = Literal["text", "messages", "words"]
"""What a column holds: a text, messages, or a list of texts."""

ROLES = ("system", "user", "assistant", "tool")
UNDETERMINED = "und"
"""The language tag for text whose language was not told (BCP 47)."""

COLUMNS: dict[Kind, dict[str, Shape]] = {
    "documents": {"id": "text", "text": "text", "source": "text", "language": "text"},
    "messages": {"id": "text", "messages": "messages", "source": "text", "language": "text"},
    "preferences": {
        "id": "text",
        "prompt": "messages",
        "chosen": "messages",
        "rejected": "messages",
        "source": "text",
        "language": "text",
    },
    "sentence_pairs": {
        "id": "text",
        "source_text": "text",
        "target_text": "text",
        "source": "text",
        "source_language": "text",
        "target_language": "text",
    },
    "labelled_texts": {"id": "text", "text": "text", "label": "text", "source": "text", "language": "text"},
    "labelled_words": {
        "id": "text",
        "words": "words",
        "labels": "words",
        "source": "text",
        "language": "text",
    },
}
_ABOUT_THE_ROW = {"id", "source", "language", "source_language", "target_language", "label", "labels"}


class BadRowError(ValueError):
    """A row that is not one of its kind; ``field`` names the column or message at fault."""

    def __init__(self, message: str, field: str, found: object = None) -> None:
        super().__init__(message)
        self.field = field
        self.found = found


def known_kind(kind: str, *, where: object = None) -> Kind:
    """``kind`` if it is one of :data:`COLUMNS`, else a :class:`PunaError`."""
    if kind not in COLUMNS:
        raise PunaError(f"unknown kind of corpus {kind!r}", where=where, expected=", ".join(COLUMNS))
    return kind


def check_row(kind: Kind, row: Mapping[str, Any]) -> None:
    """Raise :class:`BadRowError` unless ``row`` has exactly the columns of ``kind``, none of them empty."""
    for column, shape in COLUMNS[kind].items():
        if column not in row:
            raise BadRowError("the column is missing", column)
        if shape == "text":
            check_text(row[column], column)
        elif shape == "words":
            check_words(row[column], column)
        else:
            check_messages(row[column], column)
    if kind == "labelled_words":
        check_labels(row["words"], row["labels"])
    extra = sorted(set(row) - set(COLUMNS[kind]))
    if extra:
        raise BadRowError(f"kind {kind} has no such column", extra[0])


def check_text(value: Any, field: str) -> None:
    """Raise :class:`BadRowError` unless ``value`` is text that says something and can be written as UTF-8."""
    if not isinstance(value, str):
        raise BadRowError("not a text", field, f"{type(value).__name__} {value!r}")
    if not value.strip():
        raise BadRowError("the text is empty", field, repr(value))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRowError("the text holds half a surrogate pair", field, ascii(value)) from None


def check_words(value: Any, field: str) -> None:
    """Raise :class:`BadRowError` unless ``value`` is a list of texts that say something."""
    if not isinstance(value, list) or not value:
        raise BadRowError("not a list of texts", field, repr(value))
    for index, word in enumerate(value):
        check_text(word, f"{field}[{index}]")


def check_labels(words: Sequence[str], labels: Sequence[str]) -> None:
    """Raise :class:`BadRowError` unless there is a label for each word."""
    if len(words) != len(labels):
        raise BadRowError(
            "every word needs a label", "labels", f"{len(labels)} labels for {len(words)} words"
        )


def labels_of(kind: Kind, row: Mapping[str, Any]) -> list[str]:
    """The labels of a row, none where the kind has none."""
    if kind == "labelled_texts":
        return [row["label"]]
    return list(row["labels"]) if kind == "labelled_words" else []


def check_messages(value: Any, field: str) -> None:
    """Raise :class:`BadRowError` unless ``value`` is a list of messages with known roles and some content."""
    if not isinstance(value, list) or not value:
        raise BadRowError("not a list of messages", field, repr(value))
    for index, message in enumerate(value):
        here = f"{field}[{index}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise BadRowError("not a message with role and content", here, repr(message))
        if message["role"] not in ROLES:
            raise BadRowError(
                f"the role is none of {', '.join(ROLES)}", f"{here}.role", repr(message["role"])
            )
        check_text(message["content"], f"{here}.content")


def texts_of(kind: Kind, row: Mapping[str, Any], *, system: bool = True) -> Iterator[str]:
    """The texts of a row in order, without ids and tags; ``system=False`` leaves out system messages.

    System messages are often the same in every row, so a comparison of rows does without them.
    """
    for column, shape in COLUMNS[kind].items():
        if column in _ABOUT_THE_ROW:
            continue
        if shape == "text":
            yield row[column]
        elif shape == "words":
            yield " ".join(row[column])
        else:
            yield from (m["content"] for m in row[column] if system or m["role"] != "system")


def languages_of(kind: Kind, row: Mapping[str, Any]) -> str:
    """The row's language tag; for a sentence pair both, as in ``en-nl`` joined by an arrow."""
    if kind == "sentence_pairs":
        return f"{row['source_language']} → {row['target_language']}"
    return str(row["language"])
