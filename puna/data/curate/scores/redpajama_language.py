"""RedPajama-V2's signals of natural language and of size (arXiv:2411.12372, table of quality signals).

Words are either raw (runs of word characters and runs of other signs, white space apart) or normalised.
Of CCNet's fields, length and lines are counted here; language score, perplexity and bucket need models and
have operators of their own, and what a page was like before CCNet is not known any more.
"""

from __future__ import annotations

import numpy

from puna.data.curate import matching
from puna.data.curate.characters import Table, character_class, table_from
from puna.data.curate.operator import NoSettings, Signals, score
from puna.data.curate.redpajama_texts import normalised_words, rounded
from puna.data.curate.segments import ratio
from puna.data.curate.texts import Texts

SOURCE = "arXiv:2411.12372"
ELLIPSES = ("...", "…")


@score(
    "redpajama.ccnet",
    signals={"ccnet_length": "characters", "ccnet_nlines": "lines, empty ones too"},
    source=SOURCE,
)
def ccnet(texts: Texts, settings: NoSettings) -> Signals:
    """The sizes that CCNet stores."""
    return {"ccnet_length": texts.lengths, "ccnet_nlines": texts.lines("newline").counts}


@score(
    "redpajama.natural_language",
    signals={
        "rps_doc_num_sentences": "runs without . ! ? that hold a word character",
        "rps_doc_word_count": "normalised words",
        "rps_doc_mean_word_length": "characters of a normalised word; null without words",
        "rps_doc_symbol_to_word_ratio": "signs #, ... and … per raw word; null without words",
        "rps_doc_frac_lines_end_with_ellipsis": "share of lines that end with ... or …; null without lines",
        "rps_doc_frac_no_alph_words": "share of raw words without a letter from A to Z; null without words",
        "rps_doc_frac_unique_words": "share of different ones among normalised words; null without words",
        "rps_doc_unigram_entropy": "entropy of the normalised words in nats; null without words",
        "rps_doc_frac_all_caps_words": "share of raw words in capitals; null without words",
    },
    source=SOURCE,
)
def natural_language(texts: Texts, settings: NoSettings) -> Signals:
    """Sentences, words, symbols and the variety of words."""
    raw, words = texts.words("word_punct"), normalised_words(texts)
    lines = texts.lines("with_ends")
    counts = words.counts_of()
    share = ratio(counts, words.counts[words.document])
    letters = matching.any_in(raw, texts.is_class("ascii_letter"))
    symbols = matching.occurrences(texts, "#", *ELLIPSES)
    signals = {
        "rps_doc_num_sentences": _sentences(texts),
        "rps_doc_word_count": words.counts,
        "rps_doc_mean_word_length": words.mean(words.lengths),
        "rps_doc_symbol_to_word_ratio": ratio(symbols, raw.counts),
        "rps_doc_frac_lines_end_with_ellipsis": lines.mean(matching.ends_with(lines.stripped(), ELLIPSES)),
        "rps_doc_frac_no_alph_words": raw.mean(~letters),
        "rps_doc_frac_unique_words": words.mean(~words.duplicated()),
        # Each of the c copies of a word brings -log(c / n) / n.
        "rps_doc_unigram_entropy": words.mean(0.0 - numpy.log(share)),
        "rps_doc_frac_all_caps_words": raw.mean(_in_capitals(texts)),
    }
    return {name: rounded(numpy.asarray(values, dtype=numpy.float64)) for name, values in signals.items()}


def _sentences(texts: Texts) -> numpy.ndarray:
    r"""[count] matches of ``\b[^.!?]+[.!?]*``: a stretch without marks matches once if it has a word."""
    stretches = texts.runs(~texts.is_class("sentence_end"))
    return stretches.total(matching.any_in(stretches, texts.is_class("word")))


def _in_capitals(texts: Texts) -> numpy.ndarray:
    """[raw words] what ``str.isupper`` says: a capital in it, and no small or title-case letter."""
    raw = texts.words("word_punct")
    capital = matching.any_in(raw, texts.is_class("upper"))
    return capital & ~matching.any_in(raw, texts.is_class("lower") | texts.is_class("title_case"))


@character_class("ascii_letter")
def _ascii_letter() -> Table:
    return table_from("", (0x41, 0x5A), (0x61, 0x7A))


@character_class("sentence_end")
def _sentence_end() -> Table:
    return table_from(".!?")


@character_class("title_case")
def _title_case() -> Table:
    """Letters such as ǅ, which are neither capitals nor small."""
    every = numpy.arange(0x110000, dtype=numpy.uint32).view("<U1")
    return numpy.strings.istitle(every) & ~numpy.strings.isupper(every)
