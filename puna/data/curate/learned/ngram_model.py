"""S15: an n-gram model of a clean reference, which ranks documents by perplexity, arXiv:2406.14833.

Interpolated modified Kneser-Ney smoothing as KenLM's lmplz estimates it (Heafield et al. 2013): below the
highest order an n-gram counts as often as different words stand before it, and what begins a line as often as
it does; three discounts an order, by Chen and Goodman's formula; the words' distribution is interpolated with
an even one over all words and the unknown one. Nothing is pruned. The model is an ARPA file, which KenLM, and
with it ``kenlm.perplexity``, reads. Words stand between white space, a line is a sentence, as there.

Counts of counts that a small reference lacks leave a discount undefined, or out of range: that order takes
0.5, 1 and 1.5, lmplz's own fallback, and it is told how many orders did.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from puna.core.errors import PunaError
from puna.core.files import room_for, write_aside
from puna.data.curate.learned.files import area_under_curve
from puna.data.curate.learned.settings import NgramParameters
from puna.data.curate.scores.kenlm_perplexity import PerplexitySettings, perplexity
from puna.data.curate.texts import Texts

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
_MARKS = (BEGIN, END, UNKNOWN)
_FALLBACK = (0.5, 1.0, 1.5)
_NEVER = -99.0  # log10 of what no model is asked for: the mark of a beginning

Gram = tuple[str, ...]


@dataclass(frozen=True)
class NgramModel:
    """log10 probabilities and log10 back-off weights of each order's n-grams, the lowest order first."""

    probabilities: tuple[Mapping[Gram, float], ...]
    backoffs: tuple[Mapping[Gram, float], ...]
    fallbacks: int
    """Orders whose discounts a reference this small does not tell."""

    @classmethod
    def fit(cls, texts: Iterable[str], order: int) -> NgramModel:
        """The model of texts. Time grows linearly with them; memory holds every different n-gram."""
        raw = _counted(texts, order)
        if len(raw[0]) <= len(_MARKS) - 1:
            raise PunaError("no word to learn from", where="reference texts")
        adjusted = _adjusted(raw)
        lower: dict[Gram, float] = {}
        probabilities, backoffs = [], []
        fallbacks = 0
        words = {gram[0] for gram in raw[0]} - {BEGIN} | {UNKNOWN}
        for counts in adjusted:
            discounts = _discounts(counts)
            fallbacks += discounts is None
            own, weights = _interpolated(counts, discounts or _FALLBACK, lower, len(words))
            probabilities.append(own)
            backoffs.append(weights)
            lower = own
        return cls(
            tuple({gram: math.log10(p) for gram, p in own.items()} for own in probabilities),
            tuple({gram: math.log10(w) for gram, w in weights.items()} for weights in backoffs),
            fallbacks,
        )

    def save(self, path: Path) -> None:
        """Write it as an ARPA file."""
        orders = len(self.probabilities)
        with room_for(path), write_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
            file.write("\\data\\\n")
            for number, own in enumerate(self.probabilities, start=1):
                file.write(f"ngram {number}={len(own) + (number == 1)}\n")
            for number, own in enumerate(self.probabilities, start=1):
                # The weight of a context stands beside the n-gram that it is, one order below its use.
                weights = self.backoffs[number] if number < orders else {}
                file.write(f"\n\\{number}-grams:\n")
                if number == 1:
                    file.write(f"{_NEVER}\t{BEGIN}\t{weights.get((BEGIN,), 0.0):.7f}\n")
                for gram, probability in own.items():
                    line = f"{probability:.7f}\t{' '.join(gram)}"
                    file.write(line if number == orders else f"{line}\t{weights.get(gram, 0.0):.7f}")
                    file.write("\n")
            file.write("\n\\end\\\n")


def measured(
    reference: Sequence[str], other: Sequence[str], parameters: NgramParameters, path: Path
) -> dict[str, float]:
    """Write the model of the reference without the part held out; tell how well that part is told from
    ``other`` texts by KenLM's perplexity under it (``auc``), where there are any.
    """
    count = max(1, round(len(reference) * parameters.held_out))
    if len(reference) <= count:
        raise PunaError(
            "too few texts to learn from and to measure on",
            where="reference texts",
            found=len(reference),
            expected="at least 2",
        )
    model = NgramModel.fit(reference[count:], parameters.order)
    model.save(path)
    found = {f"ngrams.{order}": float(len(own)) for order, own in enumerate(model.probabilities, start=1)}
    found |= {
        "texts.reference": float(len(reference) - count),
        "orders_with_fallback": float(model.fallbacks),
    }
    ranked = _perplexities(reference[:count], path)
    found["perplexity.held_out"] = float(numpy.median(ranked))
    if other:
        rest = _perplexities(other, path)
        found |= {"perplexity.other": float(numpy.median(rest)), "texts.other": float(len(rest))}
        found["auc"] = area_under_curve(-ranked, -rest)
    return found


def _perplexities(texts: Sequence[str], path: Path) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]:
    values = perplexity(Texts(list(texts)), PerplexitySettings(model=str(path)))["perplexity"]
    assert isinstance(values, numpy.ndarray)
    return values[~numpy.isnan(values)]


def _counted(texts: Iterable[str], order: int) -> list[Counter[Gram]]:
    """How often each n-gram of 1 to ``order`` words stands in a line between its marks."""
    counts: list[Counter[Gram]] = [Counter() for _ in range(order)]
    for text in texts:
        for line in text.split("\n"):
            words = [word for word in line.split() if word not in _MARKS and "\0" not in word]
            if not words:
                continue
            marked = [BEGIN, *words, END]
            for number, count in enumerate(counts, start=1):
                count.update(zip(*(marked[start:] for start in range(number)), strict=False))
    return counts


def _adjusted(raw: Sequence[Counter[Gram]]) -> list[Counter[Gram]]:
    """Counts as Kneser and Ney take them; that of the mark of a beginning alone is left out."""
    found: list[Counter[Gram]] = []
    for number, count in enumerate(raw):
        if number == len(raw) - 1:
            adjusted = Counter(count)
        else:
            adjusted = Counter(gram[1:] for gram in raw[number + 1])
            adjusted.update({gram: times for gram, times in count.items() if gram[0] == BEGIN})
        adjusted.pop((BEGIN,), None)
        found.append(adjusted)
    return found


def _discounts(counts: Counter[Gram]) -> tuple[float, float, float] | None:
    """What is taken off counts of 1, 2, and 3 and more; None where the counts do not tell."""
    of = Counter(counts.values())
    if not all(of[times] for times in (1, 2, 3, 4)):
        return None
    share = of[1] / (of[1] + 2 * of[2])
    one, two, three = (times - (times + 1) * share * of[times + 1] / of[times] for times in (1, 2, 3))
    return (one, two, three) if 0 < one <= 1 and 0 < two <= 2 and 0 < three <= 3 else None


def _interpolated(
    counts: Counter[Gram], discounts: tuple[float, float, float], lower: Mapping[Gram, float], words: int
) -> tuple[dict[Gram, float], dict[Gram, float]]:
    """Probabilities of an order's n-grams, and the weight that each context gives to the order below.

    Below the words lies an even distribution over so many ``words``.
    """
    totals: defaultdict[Gram, int] = defaultdict(int)
    spared: defaultdict[Gram, float] = defaultdict(float)
    for gram, times in counts.items():
        totals[gram[:-1]] += times
        spared[gram[:-1]] += discounts[min(times, 3) - 1]
    weights = {context: spared[context] / total for context, total in totals.items()}
    own = {
        gram: (times - discounts[min(times, 3) - 1]) / totals[gram[:-1]]
        + weights[gram[:-1]] * (lower[gram[1:]] if lower else 1 / words)
        for gram, times in counts.items()
    }
    if not lower:
        own[UNKNOWN,] = weights[()] / words
    return own, weights
