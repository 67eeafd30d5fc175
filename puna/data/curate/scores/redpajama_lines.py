"""RedPajama-V2's signals of lines, as spans that together cover a document (arXiv:2411.12372)."""

from __future__ import annotations

import numpy

from puna.data.curate import matching
from puna.data.curate.operator import NoSettings, Signals, Spans, score
from puna.data.curate.redpajama_texts import normalised_lines, normalised_words, rounded
from puna.data.curate.segments import ratio
from puna.data.curate.texts import Texts

TERMINAL_MARKS = (".", "!", "?", "”")
BULLETS = tuple("•‣▶◀◦■□▪▫–")
_JAVASCRIPT = "javascript"


@score(
    "redpajama.lines",
    spans={
        "rps_lines_ending_with_terminal_punctution_mark": "1 for a line that ends with . ! ? or ”, else 0",
        "rps_lines_javascript_counts": "words javascript in the normalised line",
        "rps_lines_num_words": "words of the normalised line",
        "rps_lines_numerical_chars_fraction": "share of numeric characters in the normalised line",
        "rps_lines_start_with_bulletpoint": "1 for a line that begins with one of ten bullets, else 0",
        "rps_lines_uppercase_letter_fraction": "share of capitals in the line, its line feed counted",
    },
    source="arXiv:2411.12372",
)
def lines(texts: Texts, settings: NoSettings) -> Signals:
    """What lines hold, begin with and end with; an empty document has no line."""
    found, plain = texts.lines("with_ends"), normalised_lines(texts)
    inner = found.stripped()
    words = normalised_words(texts)
    # A word lies in the last line that begins at or before it.
    line_of = numpy.searchsorted(plain.starts, words.starts, side="right") - 1
    scripts = line_of[matching.among_few(words, matching.hashes_of_words((_JAVASCRIPT,)))]
    numeric = ratio(plain.count_in(plain.texts.is_class("numeric")), plain.lengths)
    capitals = ratio(found.count_in(texts.is_class("upper")), found.lengths)
    return {
        "rps_lines_ending_with_terminal_punctution_mark": Spans.of(
            found, matching.ends_with(inner, TERMINAL_MARKS)
        ),
        "rps_lines_javascript_counts": Spans.of(found, numpy.bincount(scripts, minlength=found.count)),
        "rps_lines_num_words": Spans.of(found, numpy.bincount(line_of, minlength=found.count)),
        "rps_lines_numerical_chars_fraction": Spans.of(found, rounded(numpy.nan_to_num(numeric))),
        "rps_lines_start_with_bulletpoint": Spans.of(found, matching.begins_with(inner, BULLETS)),
        "rps_lines_uppercase_letter_fraction": Spans.of(found, rounded(capitals)),
    }
