"""Gopher's repetition signals, counting the copies that come after the first (arXiv:2112.11446, table A1).

The paper says "fraction of duplicate lines" and does not say whether a line's first occurrence is one of
its duplicates. Here it is not, as in datatrove's GopherRepetitionFilter, whose definitions these are:
shares are of all characters of the text, white space too, and among runs of 5 to 10 words a copy is
stepped over once it is counted. With the first occurrence counted too: ``dclm.repetition``. Words stand
between white space, where datatrove's spaCy cuts punctuation off.
"""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate import boundaries, repetition  # noqa: F401  (boundaries registers kinds of words)
from puna.data.curate.operator import Signals, score
from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts, lines

TOP = (2, 3, 4)
COPIED = (5, 6, 7, 8, 9, 10)


class RepetitionSettings(Parameters):
    """What counts as a word."""

    words: str = "white_space"
    """Kind of words: white_space, unicode (UAX #29), word_punct or another registered one."""


@score(
    "gopher.repetition",
    settings=RepetitionSettings,
    signals={
        "extra_line_share": "share of lines that an equal one came before",
        "extra_line_characters": "share of characters in such lines; null without characters",
        "extra_paragraph_share": "share of paragraphs that an equal one came before",
        "extra_paragraph_characters": "share of characters in such paragraphs; null without characters",
        **{f"top_{n}gram_characters": f"share in all copies of the most frequent {n} words" for n in TOP},
        **{f"extra_{n}gram_characters": f"share in runs of {n} words that came before" for n in COPIED},
    },
    source="arXiv:2112.11446",
)
def extra(texts: Texts, settings: RepetitionSettings) -> Signals:
    """Shares of lines, paragraphs and runs of words that have come before."""
    signals: dict[str, NDArray[numpy.float64]] = {}
    for name, kind in (("line", "broken"), ("paragraph", "paragraph_of_stripped")):
        segments = texts.lines(kind)
        copies = segments.duplicated()
        signals[f"extra_{name}_share"] = segments.mean(copies)
        signals[f"extra_{name}_characters"] = ratio(segments.total(segments.lengths * copies), texts.lengths)
    words = texts.words(settings.words)
    for n in TOP:
        top = repetition.first_top(words, settings.words, n, gap=1)
        alone = repetition.first_ngram(words, settings.words, n, gap=1)
        signals[f"top_{n}gram_characters"] = ratio(numpy.where(top > 0, top, alone), texts.lengths)
    for n in COPIED:
        copied = repetition.jumped(words, settings.words, n)
        signals[f"extra_{n}gram_characters"] = ratio(copied, texts.lengths)
    return signals


@lines("broken")
def _broken(texts: Texts) -> Segments:
    r"""What ``re.split(r"\n+")`` gives: an empty one where a text begins or ends with line ends."""
    found = texts.lines("newline")
    kept = found.lengths > 0
    kept[found.bounds[:-1]] = True
    kept[found.bounds[1:] - 1] = True
    return found.where(kept)


@lines("paragraph_of_stripped")
def _paragraph_of_stripped(texts: Texts) -> Segments:
    r"""What ``re.split(r"\n{2,}", text.strip())`` gives."""
    found, inner = texts.lines("paragraph"), texts.whole().stripped()
    starts = numpy.maximum(found.starts, inner.starts[found.document])
    ends = numpy.minimum(found.ends, inner.ends[found.document])
    # A text of white space alone has one paragraph, an empty one.
    kept = starts < ends
    kept[found.bounds[:-1][inner.lengths == 0]] = True
    return Segments(texts, starts[kept], numpy.maximum(starts, ends)[kept], found.document[kept])
