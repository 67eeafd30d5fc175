"""Data-Juicer's mappers of LaTeX sources: comments, headers, macros, bibliographies (S50, arXiv:2309.02033).

A command's name ends where letters end; a header is cut off before the first sectioning command.
"""

from __future__ import annotations

import re

import numpy

from puna.core.stage import Parameters
from puna.data.curate.maps.data_juicer_clean import each
from puna.data.curate.operator import Mapped, NoSettings, mapper
from puna.data.curate.scores.data_juicer_characters import SOURCE
from puna.data.curate.texts import Texts

_BIBLIOGRAPHY = re.compile(
    r"\\appendix|\\begin\{(?:references|REFERENCES|thebibliography)\}|\\bibliography\{[^\n]*\}"
)
_HEADER = re.compile(
    r"\\(?:chapter|part|section|subsection|subsubsection|paragraph|subparagraph)\b\*?(?:\[[^\]]*\])?\{"
)
_INLINE_COMMENT = re.compile(r"[^\\]%.+$", re.MULTILINE)
_COMMENT_LINE = re.compile(r"^%.*\n?", re.MULTILINE)
_MACRO = re.compile(r"\\newcommand\b\*?\{(\\[a-zA-Z0-9]+)\}\{(.*?)\}$", re.MULTILINE)
_DEFINITION = re.compile(r"\\def\s*(\\[a-zA-Z0-9]+)\s*\{(.*?)\}$", re.MULTILINE)


class CommentSettings(Parameters):
    """Which comments."""

    inline: bool = True
    """Take out comments behind text on its line, with the character before them."""
    lines: bool = True
    """Take out lines that are comments."""


@mapper("data_juicer.remove_bibliography", source=SOURCE)
def remove_bibliography(texts: Texts, settings: NoSettings) -> list[str | None]:
    """Cuts a LaTeX source at its bibliography or appendix (``remove_bibliography_mapper``)."""
    return each(texts, _before_bibliography)


def _before_bibliography(text: str) -> str:
    found = _BIBLIOGRAPHY.search(text)
    return text if found is None else text[: found.start()]


@mapper("data_juicer.remove_comments", settings=CommentSettings, source=SOURCE)
def remove_comments(texts: Texts, settings: CommentSettings) -> list[str | None]:
    """Takes out comments of a LaTeX source (``remove_comments_mapper``)."""

    def without(text: str) -> str:
        if "%" not in text:
            return text
        text = _INLINE_COMMENT.sub("", text) if settings.inline else text
        return _COMMENT_LINE.sub("", text) if settings.lines else text

    return each(texts, without)


@mapper(
    "data_juicer.remove_header",
    signals={"has_header": "1 if there is a sectioning command, else 0"},
    source=SOURCE,
)
def remove_header(texts: Texts, settings: NoSettings) -> Mapped:
    """Cuts off what stands before the first sectioning command (``remove_header_mapper``).

    Data-Juicer empties texts without one; here a gate on ``has_header`` drops them.
    """
    found = [_HEADER.search(text) for text in texts.texts]
    made = [
        text[match.start() :] if match is not None and match.start() else None
        for text, match in zip(texts.texts, found, strict=True)
    ]
    return Mapped(made, {"has_header": numpy.array([match is not None for match in found], dtype=float)})


@mapper("data_juicer.expand_macro", source=SOURCE)
def expand_macro(texts: Texts, settings: NoSettings) -> list[str | None]:
    r"""Puts the definitions of macros without arguments in their places (``expand_macro_mapper``).

    Macros are expanded in the order of their definitions, those of ``\newcommand`` first, each once over
    the whole text, where a character that is no letter or digit follows.
    """
    return each(texts, _expanded)


def _expanded(text: str) -> str:
    macros: dict[str, str] = {}
    for pattern in (_MACRO, _DEFINITION):
        macros |= {match.group(1): match.group(2) for match in pattern.finditer(text)}
    for name, value in macros.items():
        text = _with_macro(text, name, value)
    return text


def _with_macro(text: str, name: str, value: str) -> str:
    return re.sub(re.escape(name) + r"(?=[^a-zA-Z0-9])", lambda match: value, text)
