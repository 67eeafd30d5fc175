"""RefinedWeb's line-wise rules as signals: what lines are like, and how much of a page they flag.

Source: arXiv:2306.01116, appendix G.2, with DCLM's bounds (arXiv:2406.11794), since RefinedWeb gives none
for "mainly" capitals. Nothing is edited here; ``dclm.modify_lines`` takes such lines out.
"""

from __future__ import annotations

import numpy

from puna.core.stage import Parameters
from puna.data.curate.line_rules import counters, digit_share, line_words, upper_share
from puna.data.curate.operator import Signals, Spans, score
from puna.data.curate.segments import ratio
from puna.data.curate.texts import Texts


class LineSettings(Parameters):
    """Which lines count as flagged."""

    upper_maximum: float = 0.5
    """Largest share of capitals of a line that is not flagged."""
    digit_maximum: float = 0.999999
    """Largest share of digits of a line that is not flagged."""
    min_words: int = 2
    """Fewest words of a line that is not flagged."""


@score(
    "refinedweb.lines",
    settings=LineSettings,
    signals={"flagged_word_share": "share of the words that stand in flagged lines; null without words"},
    spans={
        "upper_share": "share of capitals in the line",
        "digit_share": "share of digits in the line",
        "counter": "1 if the line is a counter such as 3 likes, else 0",
        "words": "words of the line between white space",
        "flagged": "1 if a rule flags the line, else 0",
    },
    source="arXiv:2306.01116",
)
def lines(texts: Texts, settings: LineSettings) -> Signals:
    """Capitals, digits, counters and words of the lines that hold more than white space."""
    found = texts.lines("filled")
    upper, digits, words = upper_share(found), digit_share(found), line_words(found)
    counter = counters(found)
    flagged = (upper > settings.upper_maximum) | (digits > settings.digit_maximum)
    flagged |= counter | (words < settings.min_words)
    return {
        "flagged_word_share": ratio(found.total(words * flagged), found.total(words)),
        "upper_share": Spans.of(found, upper),
        "digit_share": Spans.of(found, digits),
        "counter": Spans.of(found, counter.astype(numpy.float64)),
        "words": Spans.of(found, words),
        "flagged": Spans.of(found, flagged.astype(numpy.float64)),
    }
