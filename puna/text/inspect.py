"""Shows what a model is trained on: tokens coloured by whether they are learnt, and what was lost.

In a file or a pipe, which have no colours, learnt tokens stand in brackets: ⟦ ⟧. All functions return
rich renderables; nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from puna.core.errors import PunaError
from puna.model.spec import LlamaSpec
from puna.text.encode import Encoded, encode_rows
from puna.text.labelled import LABELLED, encode_labelled, names_in
from puna.text.packing import Mode, Packed, PackReport, Row, pack, usual_mode
from puna.text.template import Template
from puna.text.tokenizer import Tokenizer

LEARNT = "black on green3"
NOT_LEARNT = "grey62"
SPECIAL = "bold magenta"
OPEN, CLOSE = "⟦", "⟧"
# Control characters as their pictures (a corpus must not steer the terminal), white space as signs.
_SHOWN = {code: chr(0x2400 + code) for code in range(32)} | {
    code: f"\\x{code:02x}" for code in range(127, 160)
}
_SHOWN |= {ord(" "): "·", ord("\n"): "⏎\n", ord("\t"): "⇥", 0xA0: "⍽"}


@dataclass(frozen=True)
class Marked:
    """A text in colours, and the same for where there are none."""

    coloured: Text
    plain: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Print the one that this console can show."""
        yield self.plain if console.color_system is None or console.no_color else self.coloured


@dataclass(frozen=True)
class Inspection:
    """The packed rows of a corpus and how they are shown."""

    packed: Packed
    encoded: Sequence[Encoded]
    view: RenderableType


def inspect_corpus(
    rows: Iterable[Mapping[str, Any]],
    kind: str,
    tokenizer: Tokenizer,
    template: Template | None = None,
    *,
    length: int,
    mode: Mode | None = None,
    train_on: Sequence[str] = ("assistant",),
    samples: int = 2,
    limit: int | None = None,
) -> Inspection:
    """Encode and pack the rows of a corpus (at most ``limit``) as training does, and show it.

    Without ``mode`` rows are packed as usual for the kind of corpus.

    Shown are the first ``samples`` packed rows with every token coloured, and the table of what was
    packed, truncated and dropped. The counts are of the rows looked at, not of the whole corpus.
    """
    chosen = islice(rows, limit)
    if kind in LABELLED:
        labelled = list(chosen)
        encoded = encode_labelled(labelled, kind, tokenizer, names_in(labelled, kind))
    else:
        encoded = encode_rows(chosen, kind, tokenizer, template, train_on=train_on)
    packed = pack(encoded, length, mode=mode or usual_mode(kind))
    parts: list[RenderableType] = [legend()]
    for number, row in enumerate(packed[:samples]):
        shown = marked(show_row(tokenizer, row))
        parts.append(Panel(shown, title=f"row {number}: {row.source}", title_align="left"))
    parts.append(report_table(packed.report))
    return Inspection(packed, encoded, Group(*parts))


def legend() -> Marked:
    """What colours, brackets and signs mean."""
    signs = "  · space  ⏎ newline"
    coloured = Text.assemble(
        ("learnt", LEARNT), " ", ("not learnt", NOT_LEARNT), " ", ("<special>", SPECIAL), signs
    )
    return Marked(coloured, Text(f"{OPEN}learnt{CLOSE} not learnt{signs}"))


def marked(shown: Text) -> Marked:
    """Tokens as :func:`show_tokens` colours them, and with brackets around those that are learnt."""
    plain, inside = Text(), False
    for span in shown.spans:
        learnt = LEARNT in str(span.style)
        if learnt != inside:
            plain.append(OPEN if learnt else CLOSE)
        plain.append(shown.plain[span.start : span.end])
        inside = learnt
    return Marked(shown, plain.append(CLOSE) if inside else plain)


def show_row(tokenizer: Tokenizer, row: Row) -> Text:
    """A packed row, its documents one below the other."""
    text = Text()
    for number, piece in enumerate(row.slices):
        if number:
            text.append("\n── next document ──\n", "dim")
        document = piece.document
        trained = [False, *document.trained[piece.start + 1 : piece.stop]]  # a slice's first is never learnt
        text.append_text(show_tokens(tokenizer, document.ids[piece.start : piece.stop], trained))
    return text


def show_tokens(tokenizer: Tokenizer, ids: Sequence[int], trained: Sequence[bool]) -> Text:
    """Tokens coloured by whether they are learnt; white space and special tokens are visible.

    Neighbouring tokens differ in being underlined. Characters that are split over several tokens
    are shown at the first of them as a whole, at the others as ``‥``.
    """
    text = Text()
    for number, (shown, learnt, token) in enumerate(zip(_visible(tokenizer, ids), trained, ids, strict=True)):
        colour = LEARNT if learnt else NOT_LEARNT
        styles = [
            colour,
            SPECIAL if token in tokenizer.special_ids else "",
            "underline" if number % 2 else "",
        ]
        text.append(shown, " ".join(filter(None, styles)))
    return text


def report_table(report: PackReport) -> Table:
    """Rows and tokens: what came in, and where each of them went and why."""
    table = Table(title=f"packing: {report.mode}, rows of {report.length} tokens", title_justify="left")
    table.add_column("")
    table.add_column("documents", justify="right")
    table.add_column("tokens", justify="right")
    table.add_row("in", f"{report.rows_in:,}", f"{report.tokens_in:,}")
    table.add_row("packed", f"{report.used:,}", f"{report.tokens:,}")
    table.add_row(f"cut off at {report.length}", f"({report.truncated_rows:,})", f"{report.truncated:,}")
    for reason, count in report.dropped.items():
        table.add_row(f"dropped: {reason}", f"{count:,}", f"{report.dropped_tokens[reason]:,}")
    table.add_section()
    share = report.targets / report.tokens if report.tokens else 0.0
    table.add_row("learnt", "", f"{report.targets:,} ({share:.0%})")
    table.add_row("packed rows", f"{report.rows:,}", f"{report.filled:.0%} filled")
    if report.cuts:
        table.add_row("continued in the next row", f"({report.cuts:,})", "")
    return table


def inspect_model(
    spec: LlamaSpec, tokenizer: Tokenizer | None = None, template: Template | None = None
) -> RenderableType:
    """A model's layers, its special tokens, and one conversation as its template writes it."""
    parts: list[RenderableType] = [spec.table()]
    if tokenizer is not None:
        parts.append(_tokenizer_table(spec, tokenizer))
    if tokenizer is not None and template is not None:
        parts.append(_example(tokenizer, template))
    return Group(*parts)


def _tokenizer_table(spec: LlamaSpec, tokenizer: Tokenizer) -> Table:
    table = Table(title="tokenizer", title_justify="left", show_header=False)
    table.add_row("vocabulary", f"{tokenizer.vocab_size:,} of {spec.vocab_size:,} embedding rows")
    for name, token in tokenizer.strings.items():
        table.add_row(name, Text(f"{token} ({tokenizer.id_of(token)})"))
    stops = zip(tokenizer.tokens(tokenizer.stop_ids), tokenizer.stop_ids, strict=True)
    table.add_row("stops at", Text(", ".join(f"{token} ({index})" for token, index in stops)))
    table.add_row("adds BOS to documents", "yes" if tokenizer.adds_bos else "no")
    table.add_row("fingerprint", tokenizer.fingerprint)
    return table


def _example(tokenizer: Tokenizer, template: Template) -> Panel:
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi there."}]
    try:
        encoded = encode_rows([{"id": "example", "messages": messages}], "messages", tokenizer, template)[0]
    except PunaError as error:
        return Panel(Text(str(error)), title="the chat template cannot be trained with", title_align="left")
    shown = marked(show_tokens(tokenizer, encoded.ids, encoded.trained))
    title = f"chat template {template.fingerprint}"
    return Panel(Group(shown, legend()), title=title, title_align="left")


def _visible(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, with white space made visible."""
    shown: list[str] = []
    start = 0

    def added(count: int) -> str:
        """The text of ``count`` tokens from ``start`` on, decoded behind another so that no space goes."""
        before = max(start - 1, 0)
        known = tokenizer.decode(ids[before:start], skip_special=False)
        return tokenizer.decode(ids[before : start + count], skip_special=False)[len(known) :]

    while start < len(ids):
        count = 1
        while added(count).endswith("\ufffd"):
            if count == 4 or start + count == len(ids):  # no character has more than four bytes
                count = 1
                break
            count += 1
        piece = added(count)
        shown += [piece.translate(_SHOWN) or "‥", *["‥"] * (count - 1)]
        start += count
    return shown
