"""RedPajama-V2's signals of repetition, over normalised words (arXiv:2411.12372).

Every copy counts, each word once, as in ``dclm.repetition``; of several most frequent n-grams the first
one is measured, where DCLM measures the longest.
"""

from __future__ import annotations

import numpy

from puna.data.curate import repetition
from puna.data.curate.operator import NoSettings, Signals, score
from puna.data.curate.redpajama_texts import normalised_words, rounded
from puna.data.curate.segments import ratio
from puna.data.curate.texts import Texts

TOP = (2, 3, 4)
COPIED = (5, 6, 7, 8, 9, 10)
_WORDS = "white_space"


@score(
    "redpajama.repetition",
    signals={
        **{f"rps_doc_frac_chars_top_{n}gram": f"of the words', share in the first top {n}-gram" for n in TOP},
        **{f"rps_doc_frac_chars_dupe_{n}grams": f"of the words', share in copied {n}-grams" for n in COPIED},
    },
    source="arXiv:2411.12372",
)
def copies(texts: Texts, settings: NoSettings) -> Signals:
    """Shares of the normalised words' characters in repeated n-grams; 0 for a document without words."""
    words = normalised_words(texts)
    letters = numpy.maximum(words.total(words.lengths), 1)
    signals = {}
    for n in TOP:
        top = repetition.first_top(words, _WORDS, n)
        signals[f"rps_doc_frac_chars_top_{n}gram"] = rounded(ratio(top, letters))
    for n in COPIED:
        copied = repetition.covered(words, _WORDS, n)
        signals[f"rps_doc_frac_chars_dupe_{n}grams"] = rounded(ratio(copied, letters))
    return signals
