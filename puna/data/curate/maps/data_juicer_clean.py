"""Data-Juicer's mappers that take things out of texts: addresses, links, markup, headers of licences.

S50, arXiv:2309.02033; the patterns accept what modelscope/data-juicer's accept. Links are found with a
pattern that matches the same texts without its nested repetitions, whose time may double with each
character. A document without the few characters that any match needs is never searched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from html.parser import HTMLParser

import numpy

from puna.core.stage import Parameters
from puna.data.curate.operator import Mapped, NoSettings, mapper
from puna.data.curate.scores.data_juicer_characters import SOURCE
from puna.data.curate.texts import Texts

_EMAIL = re.compile(r"[A-Za-z0-9.\-+_]+@[a-z0-9.\-+_]+\.[a-z]+")
_OCTET = r"(?:1[0-9][0-9]|2[0-4][0-9]|25[0-5]|[1-9][0-9]|[0-9])"
_ADDRESS = re.compile(rf"(?:{_OCTET}\.){{3}}{_OCTET}|(?:[\da-fA-F]{{1,4}}:){{7}}[\da-fA-F]{{1,4}}")
_INNER = r"\((?:[^\s()<>]|\([^\s()<>]+\))*\)"
_LINK = re.compile(
    r"\b(?:[a-z][\w-]+:(?:/{1,3}|[a-z0-9%])|www\d{0,3}[.]|[a-z0-9.\-]+[.][a-z]{2,4}/)"
    rf"(?:[^\s()<>]|{_INNER})+"
    rf"(?:{_INNER}|[^\s`!()\[\]{{}};:'\".,<>?«»“”‘’])",
    re.IGNORECASE,
)
_MAY_HOLD_LINK = re.compile(r":[/a-z0-9%]|www\d{0,3}\.|\.[a-z]{2,4}/", re.IGNORECASE)
_COMMENT = re.compile(r"/\*[^*]*\*+(?:[^/*][^*]*\*+)*/")
_LINE_COMMENTS = ("//", "#", "--")


class ReplacementSettings(Parameters):
    """What stands in the place of what is found."""

    replacement: str = ""
    """Text put there; a plain text, whatever is in it."""


def substituted(
    texts: Texts, pattern: re.Pattern[str], replacement: str, candidates: Iterable[int] | None = None
) -> Mapped:
    """Every match of ``pattern`` replaced in the documents at ``candidates`` (all, if None are given)."""
    changed: list[str | None] = [None] * texts.count
    counts = numpy.zeros(texts.count)
    for place in range(texts.count) if candidates is None else candidates:
        text, found = pattern.subn(lambda match: replacement, texts.texts[place])
        if found:
            changed[place], counts[place] = text, found
    return Mapped(changed, {"replaced": counts})


def _holding(texts: Texts, needed: str) -> list[int]:
    return [place for place, text in enumerate(texts.texts) if needed in text]


@mapper(
    "data_juicer.clean_email",
    settings=ReplacementSettings,
    signals={"replaced": "addresses taken out"},
    source=SOURCE,
)
def clean_email(texts: Texts, settings: ReplacementSettings) -> Mapped:
    """Takes out e-mail addresses (``clean_email_mapper``)."""
    return substituted(texts, _EMAIL, settings.replacement, _holding(texts, "@"))


@mapper(
    "data_juicer.clean_ip",
    settings=ReplacementSettings,
    signals={"replaced": "addresses taken out"},
    source=SOURCE,
)
def clean_ip(texts: Texts, settings: ReplacementSettings) -> Mapped:
    """Takes out addresses of IPv4 and uncompressed IPv6 (``clean_ip_mapper``).

    Four numbers with points between them are one wherever they stand, inside of longer ones too.
    """
    return substituted(texts, _ADDRESS, settings.replacement)


@mapper(
    "data_juicer.clean_links",
    settings=ReplacementSettings,
    signals={"replaced": "links taken out"},
    source=SOURCE,
)
def clean_links(texts: Texts, settings: ReplacementSettings) -> Mapped:
    """Takes out links: with a scheme, with www, or a name with a path (``clean_links_mapper``)."""
    changed: list[str | None] = [None] * texts.count
    counts = numpy.zeros(texts.count)
    for place, text in enumerate(texts.texts):
        if _MAY_HOLD_LINK.search(text) is not None:
            made, counts[place] = _without_links(text, settings.replacement)
            changed[place] = made if counts[place] else None
    return Mapped(changed, {"replaced": counts})


def _without_links(text: str, replacement: str) -> tuple[str, int]:
    """The text without links, and how many there were.

    A match begins in the run of letters, digits, points and dashes before what shows that there may be
    one, so that only these runs are tried and not every word.
    """
    parts: list[str] = []
    done = 0
    for sign in _MAY_HOLD_LINK.finditer(text):
        if sign.start() < done:
            continue
        start = sign.start()
        while start > done and (text[start - 1].isalnum() or text[start - 1] in "._-"):
            start -= 1
        for place in range(start, sign.start() + 1):
            match = _LINK.match(text, place)
            if match is not None:
                parts += [text[done : match.start()], replacement]
                done = match.end()
                break
    if not parts:
        return text, 0
    return "".join([*parts, text[done:]]), len(parts) // 2


@mapper("data_juicer.clean_copyright", source=SOURCE)
def clean_copyright(texts: Texts, settings: NoSettings) -> list[str | None]:
    """Takes out a comment that speaks of copyright, or the comment lines a text begins with.

    As ``clean_copyright_mapper``: only the first comment between /* and */ is looked at, and where there
    is one, lines are left alone.
    """
    return each(texts, _without_copyright)


def each(texts: Texts, make: Callable[[str], str]) -> list[str | None]:
    """Each text passed through ``make``; None where that changes nothing."""
    made = [make(text) for text in texts.texts]
    return [new if new != old else None for new, old in zip(made, texts.texts, strict=True)]


def _without_copyright(text: str) -> str:
    comment = _COMMENT.search(text)
    if comment is not None:
        if "copyright" in comment.group().lower():
            return text[: comment.start()] + text[comment.end() :]
        return text
    lines = text.split("\n")
    skipped = 0
    while skipped < len(lines) and (not lines[skipped] or lines[skipped].startswith(_LINE_COMMENTS)):
        skipped += 1
    return "\n".join(lines[skipped:])


class _TextOf(HTMLParser):
    """Collects the text of a page, without that of scripts and styles, and a star before list items."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A list item or a list begins a line with a star."""
        if tag in ("script", "style"):
            self.hidden += 1
        elif tag in ("li", "ol") and not attrs:
            self.parts.append("\n*")

    def handle_endtag(self, tag: str) -> None:
        """Text is shown again behind a script."""
        if tag in ("script", "style"):
            self.hidden = max(self.hidden - 1, 0)

    def handle_data(self, data: str) -> None:
        """Text of the page."""
        if not self.hidden:
            self.parts.append(data)


@mapper("data_juicer.clean_html", source=SOURCE)
def clean_html(texts: Texts, settings: NoSettings) -> list[str | None]:
    """Takes out the markup of HTML; list items begin with a star (``clean_html_mapper``).

    Python's parser of HTML does it, where Data-Juicer has selectolax; that one shows scripts as text.
    """
    return [_text_of(text) if "<" in text or "&" in text else None for text in texts.texts]


def _text_of(text: str) -> str:
    parser = _TextOf()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)
