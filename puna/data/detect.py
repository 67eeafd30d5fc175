"""Which of the field's dataset formats a table has, told from its columns, and its rows turned into ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from puna.core.errors import PunaError, nearest
from puna.data.kinds import BadRowError, Kind, check_labels, check_messages, check_text, check_words

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Languages:
    """The language tags a source was told: of its text, or of the two sides of its pairs."""

    text: str
    source: str
    target: str


Convert = Callable[[Mapping[str, Any], Languages], dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """A format of rows: its kind, the columns it must have, those it may have, how a row is turned."""

    name: str
    kind: Kind
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Convert


@dataclass(frozen=True)
class Detection:
    """The format a table was found to have. ``mapping`` leads from the format's columns to the table's."""

    format: Format
    mapping: dict[str, str]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        columns = ", ".join(
            ours if ours == theirs else f"{ours} from {theirs}" for ours, theirs in self.mapping.items()
        )
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.format.name} -> {self.format.kind} ({columns}{unused})"

    def convert(self, raw: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
        """The columns of our row, without id and source. Raises :class:`BadRowError`."""
        row = {ours: raw[theirs] for ours, theirs in self.mapping.items() if theirs in raw}
        for column in self.format.needed:
            if column not in row or row[column] is None:
                raise BadRowError("the column is missing or null", self.mapping[column])
        return self.format.convert(row, languages)


def detect(
    columns: Iterable[str],
    *,
    kind: str | None = None,
    rename: Mapping[str, str] | None = None,
    where: object = None,
) -> Detection:
    """The first known format whose needed columns are all there; with ``kind``, one that gives that kind.

    ``rename`` maps the names a format uses to the table's own, as ``{"text": "body"}``. No fitting
    format, or a renamed column that the table lacks, is a :class:`PunaError`.
    """
    present = list(columns)
    rename = dict(rename or {})
    for ours, theirs in rename.items():
        if theirs not in present:
            close = nearest(theirs, present)
            raise PunaError(
                f"no column {theirs!r} to be read as {ours!r}",
                where=where,
                found=", ".join(present),
                fix=f"did you mean {close!r}?" if close else None,
            )
    names = {column: column for column in present if column not in rename.values()} | rename
    for format_ in FORMATS:
        if kind in (None, format_.kind) and all(column in names for column in format_.needed):
            used = [column for column in (*format_.needed, *format_.optional) if column in names]
            mapping = {column: names[column] for column in used}
            return Detection(format_, mapping, tuple(c for c in present if c not in mapping.values()))
    suitable = [format_ for format_ in FORMATS if kind in (None, format_.kind)]
    raise PunaError(
        "no known format of rows has these columns"
        if kind is None
        else f"no format of {kind} has these columns",
        where=where,
        found=", ".join(present) or "no column",
        expected="; or ".join(f"{f.name}: {', '.join(f.needed)}" for f in suitable),
        fix="name the columns that hold them, as in  columns: {text: body}",
    )


def _messages(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    return _with_language(row, languages, messages=_openai(row["messages"], "messages"))


def _sharegpt(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise BadRowError("not a list of turns", "conversations", repr(turns))
    messages = _system(row)
    for index, turn in enumerate(turns):
        here = f"conversations[{index}]"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise BadRowError("not a turn with from and value", here, repr(turn))
        if turn["from"] not in _SHAREGPT_ROLES:
            raise BadRowError("unknown speaker", f"{here}.from", repr(turn["from"]))
        messages.append({"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    check_messages(messages, "conversations")
    return _with_language(row, languages, messages=messages)


def _alpaca(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    messages = _system(row)
    history = row.get("history") or []
    for index, turn in enumerate(history):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRowError("not a pair of question and answer", f"history[{index}]", repr(turn))
        messages += _exchange(turn[0], turn[1])
    check_text(row["instruction"], "instruction")
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise BadRowError("not a text", "input", repr(extra))
    question = f"{row['instruction']}\n\n{extra}" if extra.strip() else row["instruction"]
    check_text(row["output"], "output")
    messages += _exchange(question, row["output"])
    check_messages(messages, "history")
    return _with_language(row, languages, messages=messages)


def _prompt_completion(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    prompt = _conversation(row["prompt"], "prompt", "user")
    completion = _conversation(row["completion"], "completion", "assistant")
    return _with_language(row, languages, messages=_system(row) + prompt + completion)


def _preference(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    prompt = _system(row) + _conversation(row["prompt"], "prompt", "user")
    chosen = _conversation(row["chosen"], "chosen", "assistant")
    rejected = _conversation(row["rejected"], "rejected", "assistant")
    return _with_language(row, languages, prompt=prompt, chosen=chosen, rejected=rejected)


def _implicit_preference(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    chosen = _openai(row["chosen"], "chosen")
    rejected = _openai(row["rejected"], "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared in (0, len(chosen), len(rejected)):
        raise BadRowError("chosen and rejected do not share a prompt and then differ", "rejected")
    sides = {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return _with_language(row, languages, **sides)


def _pair(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    check_text(row["source_text"], "source_text")
    check_text(row["target_text"], "target_text")
    return {
        "source_text": row["source_text"],
        "target_text": row["target_text"],
        "source_language": row.get("source_language") or languages.source,
        "target_language": row.get("target_language") or languages.target,
    }


def _translation(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    sides = row["translation"]
    if not isinstance(sides, Mapping):
        raise BadRowError("not a mapping from language to text", "translation", repr(sides))
    for language in (languages.source, languages.target):
        if language not in sides:
            raise BadRowError(f"no text in {language!r}", "translation", ", ".join(map(str, sides)))
    texts = {"source_text": sides[languages.source], "target_text": sides[languages.target]}
    return _pair(texts, languages)


def _document(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    check_text(row["text"], "text")
    return _with_language(row, languages, text=row["text"])


def _labelled_text(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    check_text(row["text"], "text")
    check_text(row["label"], "label")
    return _with_language(row, languages, text=row["text"], label=row["label"])


def _labelled_words(row: Mapping[str, Any], languages: Languages) -> dict[str, Any]:
    check_words(row["words"], "words")
    check_words(row["labels"], "labels")
    check_labels(row["words"], row["labels"])
    return _with_language(row, languages, words=list(row["words"]), labels=list(row["labels"]))


def _with_language(row: Mapping[str, Any], languages: Languages, **columns: Any) -> dict[str, Any]:
    language = row.get("language") or languages.text
    check_text(language, "language")
    return {**columns, "language": language}


def _system(row: Mapping[str, Any]) -> list[dict[str, str]]:
    text = row.get("system") or ""
    if not isinstance(text, str):
        raise BadRowError("not a text", "system", repr(text))
    return [{"role": "system", "content": text}] if text.strip() else []


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _conversation(value: Any, field: str, role: str) -> list[dict[str, str]]:
    """Messages from a list of them, or one message of ``role`` from a text."""
    if isinstance(value, str):
        check_text(value, field)
        return [{"role": role, "content": value}]
    return _openai(value, field)


def _openai(value: Any, field: str) -> list[dict[str, str]]:
    """Checked messages; a key that our messages cannot keep is refused unless it is null."""
    if not isinstance(value, list):
        raise BadRowError("not a list of messages", field, repr(value))
    messages = []
    for index, message in enumerate(value):
        here = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise BadRowError("not a message with role and content", here, repr(message))
        kept = {key: item for key, item in message.items() if item is not None}
        extra = sorted(set(kept) - {"role", "content"})
        if extra:
            raise BadRowError(
                "kind messages keeps role and content only", f"{here}.{extra[0]}", kept[extra[0]]
            )
        messages.append(kept)
    check_messages(messages, field)
    return messages


FORMATS: tuple[Format, ...] = (
    Format("OpenAI messages", "messages", ("messages",), ("language",), _messages),
    Format("ShareGPT", "messages", ("conversations",), ("system", "language"), _sharegpt),
    Format(
        "preference", "preferences", ("prompt", "chosen", "rejected"), ("system", "language"), _preference
    ),
    Format("implicit preference", "preferences", ("chosen", "rejected"), ("language",), _implicit_preference),
    Format(
        "prompt-completion", "messages", ("prompt", "completion"), ("system", "language"), _prompt_completion
    ),
    Format(
        "Alpaca", "messages", ("instruction", "output"), ("input", "system", "history", "language"), _alpaca
    ),
    Format(
        "sentence pairs",
        "sentence_pairs",
        ("source_text", "target_text"),
        ("source_language", "target_language"),
        _pair,
    ),
    Format("translation", "sentence_pairs", ("translation",), (), _translation),
    Format("labelled words", "labelled_words", ("words", "labels"), ("language",), _labelled_words),
    Format("labelled text", "labelled_texts", ("text", "label"), ("language",), _labelled_text),
    Format("raw text", "documents", ("text",), ("language",), _document),
)
"""Known formats, the more telling first: a table that fits several is read as the first."""
