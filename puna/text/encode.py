"""Rows of a corpus as token ids, each with whether it is learnt: one tokenisation, one pass.

A document is learnt from its second token to the EOS. Of a conversation the messages of the
roles in ``train_on`` are learnt, each with its end-of-turn token; which tokens these are follows
from the character spans of the one rendered text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from puna.core.errors import PunaError, unknown_name
from puna.core.progress import Track
from puna.text import infill
from puna.text.template import Message, Span, Template
from puna.text.tokenizer import Piece, Tokenizer

KINDS = ("documents", "messages", "preferences", "sentence_pairs")
_BATCH = 1024
IGNORED = -100
"""Label of a place where nothing is learnt."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row: token ids, whether each is a target (never the first), and the row's id.

    Where ``labels`` are there, each token is what is known and its label what is learnt: a number, or
    IGNORED; ``trained`` then says which tokens have one, the first perhaps among them.
    """

    ids: list[int]
    trained: list[bool]
    source: str = ""
    labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Number of tokens that are learnt."""
        return sum(self.trained)


def encode_document(tokenizer: Tokenizer, text: str, *, source: str = "") -> Encoded:
    """BOS if the tokenizer adds one, the text, EOS; everything but the first token is a target."""
    return _document(tokenizer, tokenizer.encode(text), source)


def encode_documents(
    tokenizer: Tokenizer, rows: Iterable[tuple[str, str]], markers: Sequence[str] = ()
) -> list[Encoded]:
    """:func:`encode_document` of many (row id, text) pairs, with the tokenizers library's threads.

    ``markers`` are special tokens that are recognised in the texts; what lies between them is encoded by
    itself. All others stay text.
    """
    if markers:
        return [_marked(tokenizer, text, markers, source) for source, text in rows]
    encoded: list[Encoded] = []
    batch: list[tuple[str, str]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            encoded += _documents(tokenizer, batch)
            batch = []
    return encoded + _documents(tokenizer, batch)


def _marked(tokenizer: Tokenizer, text: str, markers: Sequence[str], source: str) -> Encoded:
    unknown = [marker for marker in markers if marker not in tokenizer.special_tokens]
    if unknown:
        raise PunaError(
            "a marker is no special token of this tokenizer",
            where="markers",
            found=unknown[0],
            expected=", ".join(tokenizer.special_tokens),
        )
    pieces = tokenizer.encode_markup(text, infill.places(text, markers))
    return _document(tokenizer, [piece.id for piece in pieces], source)


def _documents(tokenizer: Tokenizer, batch: Sequence[tuple[str, str]]) -> list[Encoded]:
    ids = tokenizer.encode_batch([text for _, text in batch])
    return [_document(tokenizer, row, source) for (source, _), row in zip(batch, ids, strict=True)]


def _document(tokenizer: Tokenizer, ids: list[int], source: str) -> Encoded:
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    whole = [*bos, *ids, tokenizer.eos_id]
    return Encoded(whole, [False] + [True] * (len(whole) - 1), source)


def encode_messages(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    *,
    train_on: Sequence[str] = ("assistant",),
    first: int = 0,
    source: str = "",
) -> Encoded:
    """A conversation as its template writes it; the messages of ``train_on`` are targets.

    Messages before ``first`` are none, whatever their role: the prompt of an answer.
    Ids equal those of transformers' ``apply_chat_template``, but for two things. The strings of
    special tokens in a content stay text. And no token reaches over the end of the generation
    prompt, since none can when the model answers: where a whole text would be split differently
    there (two newlines before a word, an answer that begins with white space), training follows
    the ids that the model is given when it is used, :func:`encode_prompt`. A BOS that the
    tokenizer adds is put in front if the template writes none. Refused: a trained message that the
    template leaves out, writes twice or does not end with an end-of-turn token, and a conversation
    that begins with two BOS, whoever writes them.
    """
    text, spans = template.spans(messages)
    trained_spans = [span for span in spans if span.role in train_on and span.index >= first]
    _check_trained(messages, trained_spans, train_on, first)
    pieces = _pieces(tokenizer, template, text, spans)
    return Encoded([p.id for p in pieces], _trained(text, pieces, trained_spans), source)


def encode_prompt(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Ids of a conversation up to where the assistant is to answer, by the same path as training."""
    text, spans = template.spans(messages, add_generation_prompt=True, tools=tools)
    return [piece.id for piece in _pieces(tokenizer, template, text, spans)]


def encode_rows(
    rows: Iterable[Mapping[str, Any]],
    kind: str,
    tokenizer: Tokenizer,
    template: Template | None = None,
    *,
    train_on: Sequence[str] = ("assistant",),
    last_only: bool = False,
    markers: Sequence[str] = (),
    total: int | None = None,
) -> list[Encoded]:
    """Encode the rows of a corpus of any kind.

    A preference pair becomes two rows (prompt + chosen, prompt + rejected), of whose prompts nothing
    is learnt, a sentence pair two documents, so the result can be longer than ``rows``. Conversations
    need a ``template``; with ``last_only`` nothing but the last message of the roles ``train_on`` is
    learnt; ``markers`` are those of documents (:func:`encode_documents`). With the ``total`` number of rows
    a bar shows the progress.
    """
    if total is not None:
        with Track("tokenising", total, "rows") as track:
            shown = _advancing(rows, track)
            return encode_rows(
                shown, kind, tokenizer, template, train_on=train_on, last_only=last_only, markers=markers
            )
    if kind == "documents":
        return encode_documents(tokenizer, ((str(row["id"]), row["text"]) for row in rows), markers)
    if kind == "sentence_pairs":
        sides = ("source_text", "target_text")
        return encode_documents(
            tokenizer, ((f"{row['id']}:{side}", row[side]) for row in rows for side in sides)
        )
    if kind not in KINDS:
        raise unknown_name("kind of corpus", kind, KINDS)
    if template is None:
        raise PunaError(f"a corpus of {kind} needs a chat template", fix="use a model that has one")
    encoded = []
    for row in rows:
        for name, messages, first in _conversations(row, kind):
            if last_only:
                roles = (index for index, message in enumerate(messages) if message["role"] in train_on)
                first = max([first, *roles])
            try:
                encoded.append(
                    encode_messages(
                        tokenizer, template, messages, train_on=train_on, first=first, source=name
                    )
                )
            except PunaError as error:
                raise PunaError(
                    error.message,
                    where=f"row {name}" + (f", {error.where}" if error.where else ""),
                    found=error.found,
                    expected=error.expected,
                    fix=error.fix,
                ) from None
    return encoded


def _advancing(rows: Iterable[Mapping[str, Any]], track: Track) -> Iterator[Mapping[str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield row
        if number % _BATCH == 0:
            track.advance(_BATCH)


def _conversations(row: Mapping[str, Any], kind: str) -> list[tuple[str, list[Message], int]]:
    """Name and messages of each conversation of a row, and which message its answer begins with."""
    if kind == "messages":
        return [(str(row["id"]), list(row["messages"]), 0)]
    sides, first = ("chosen", "rejected"), len(row["prompt"])
    return [(f"{row['id']}:{side}", [*row["prompt"], *row[side]], first) for side in sides]


def _pieces(tokenizer: Tokenizer, template: Template, text: str, spans: Sequence[Span]) -> list[Piece]:
    """Encode a rendered conversation: special tokens are recognised between the contents only."""
    markup = []
    cuts = []
    position = 0
    prompt = template.generation_prompt
    for span in spans:
        if prompt and span.role == "assistant" and text.endswith(prompt, position, span.start):
            cuts.append(span.start)
        markup.append((position, span.start))
        position = span.content_end
    markup.append((position, len(text)))
    pieces = tokenizer.encode_markup(text, markup, cuts)
    bos = tokenizer.bos_id
    if bos is None:
        return pieces
    if tokenizer.adds_bos and [piece.id for piece in pieces[:1]] != [bos]:
        pieces = [Piece(bos, 0, 0, True), *pieces]
    visible = (piece.id for piece in pieces if piece.special or text[piece.start : piece.end].strip())
    if list(islice(visible, 2)) == [bos, bos]:
        raise PunaError(
            "a conversation begins with two BOS tokens",
            where="chat template",
            found=repr(text[:40]) + (", and the tokenizer adds one" if pieces[0].end == 0 else ""),
            expected="one, written by the template at the very beginning or added by the tokenizer",
            fix="take a {{ bos_token }} out of the chat template",
        )
    return pieces


def _check_trained(
    messages: Sequence[Message], spans: Sequence[Span], train_on: Sequence[str], first: int
) -> None:
    times = [0] * len(messages)
    for span in spans:
        times[span.index] += 1
        if span.role == "assistant" and span.end == span.content_end:
            raise PunaError(
                "the chat template ends the assistant's turn with no special token, so no stop is learnt",
                where=f"message {span.index}",
                expected="the EOS or another special token after the assistant's text",
                fix="end the assistant's messages with {{ eos_token }} in the chat template",
            )
    for index, message in enumerate(messages):
        if index >= first and message["role"] in train_on and times[index] != 1:
            raise PunaError(
                "the chat template does not write a message to train on exactly once",
                where=f"message {index} ({message['role']})",
                found=f"written {times[index]} times",
            )


def _trained(text: str, pieces: Sequence[Piece], spans: Sequence[Span]) -> list[bool]:
    """Whether each piece lies in one of ``spans``, which are ordered and apart.

    White space is the only thing a trained token may share with the markup beside its span: in
    " [/INST] Hello" the token " Hello" is what the model has to write.
    """
    trained = [False] * len(pieces)
    current = 0
    for number, piece in enumerate(pieces):
        while current < len(spans) and spans[current].end <= piece.start:
            current += 1
        if number == 0 or current == len(spans):
            continue
        span = spans[current]
        if span.start <= piece.start < piece.end <= span.end:
            trained[number] = True
        elif piece.end > span.start or piece.start == piece.end:
            trained[number] = _lies_in(span, piece, text)
    return trained


def _lies_in(span: Span, piece: Piece, text: str) -> bool:
    shown = text[piece.start : piece.end]
    body = shown.strip()
    if not body:
        shared = min(piece.end, span.end) - max(piece.start, span.start)
        return shared > 0 or (piece.start == piece.end and span.start <= piece.start < span.end)
    start = piece.start + shown.index(body)
    end = start + len(body)
    if start < span.start < end or start < span.end < end:
        raise PunaError(
            "a token joins the chat template's markup to a message's text",
            where=f"message {span.index} ({span.role})",
            found=repr(shown),
            fix="put white space or a special token between them in the chat template",
        )
    return span.start <= start and end <= span.end
