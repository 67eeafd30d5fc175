"""What an evaluation found: measurements per corpus and model, comparisons, metrics, tables."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from puna.evaluate.bits_per_byte import DocumentBits
from puna.evaluate.fertility import Fertility
from puna.evaluate.statistics import Interval, ratio, relative_change, sign_test
from puna.evaluate.translation import Scored


@dataclass(frozen=True)
class Documents:
    """The documents of a corpus that were measured; ``of`` is how many the corpus has."""

    ids: list[str]
    texts: list[str]
    of: int


@dataclass
class Pairs:
    """The sentence pairs of a corpus that were translated, with the prompts that were given."""

    rows: list[dict[str, Any]]
    prompts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """A model against another on the same documents: relative change of bits, documents with fewer bits."""

    change: Interval
    better: int
    documents: int
    sign_p: float


@dataclass
class Result:
    """Measurements by (corpus, model).

    Metric names, all for corpus C, model M and, in a further comparison, other model O:

    * ``bpb.C.M``: bits per byte; ``.low`` and ``.high`` end its own 95% interval
    * ``change.C.M``: bits per byte over the baseline's, minus one, with a paired interval; below
      zero is better. ``change.C.M.vs.O`` for each pair in ``compare``
    * ``better.C.M``: share of documents with fewer bits than the baseline's; ``sign_p.C.M``: the
      exact sign test of that
    * ``forgetting.M``: the change over all untouched corpora together
    * ``fertility.C.M``: tokens per byte; ``tokens_per_word.C.M``; ``lossy.C.M``: documents that the
      tokenizer does not give back as they were
    * ``chrf.C.M``, ``bleu.C.M``, and ``chrf_gain.C.M``, ``bleu_gain.C.M`` over the baseline
    """

    models: list[str]
    baseline: str
    compare: tuple[tuple[str, str], ...]
    untouched: tuple[str, ...]
    draws: int
    seed: int
    documents: dict[str, Documents] = field(default_factory=dict)
    pairs: dict[str, Pairs] = field(default_factory=dict)
    bits: dict[tuple[str, str], DocumentBits] = field(default_factory=dict)
    fertility: dict[tuple[str, str], Fertility] = field(default_factory=dict)
    translations: dict[tuple[str, str], Scored] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def others(self) -> list[str]:
        """Every model but the baseline."""
        return [model for model in self.models if model != self.baseline]

    @functools.cached_property
    def intervals(self) -> dict[tuple[str, str], Interval]:
        """Bits per byte by (corpus, model), each with its own interval."""
        return {
            key: ratio(bits.bits, bits.bytes, draws=self.draws, seed=self.seed)
            for key, bits in self.bits.items()
        }

    @functools.cached_property
    def compared(self) -> list[tuple[str, str]]:
        """Pairs [model, other]: each model with the baseline, then the further ones, each once."""
        pairs = [(model, self.baseline) for model in self.others]
        return list(dict.fromkeys([*pairs, *(pair for pair in self.compare if pair[1] != self.baseline)]))

    def name_of(self, corpus: str, model: str, other: str) -> str:
        """What a comparison's metrics end in."""
        return f"{corpus}.{model}" if other == self.baseline else f"{corpus}.{model}.vs.{other}"

    @functools.cached_property
    def comparisons(self) -> dict[tuple[str, str, str], Comparison]:
        """By (corpus, model, other): each model against the baseline, then the further pairs."""
        return {
            (corpus, *pair): self._compare(corpus, *pair)
            for corpus in self.documents
            for pair in self.compared
        }

    def _compare(self, corpus: str, model: str, other: str) -> Comparison:
        after, before = self.bits[corpus, model].bits, self.bits[corpus, other].bits
        return Comparison(
            change=relative_change(after, before, draws=self.draws, seed=self.seed),
            better=int((after < before).sum()),
            documents=len(after),
            sign_p=sign_test(after - before),
        )

    @functools.cached_property
    def forgetting(self) -> dict[str, Interval]:
        """Change of bits of all untouched corpora together, by model (the baseline left out)."""
        import numpy

        if not self.untouched:
            return {}

        def joined(model: str) -> Any:
            return numpy.concatenate([self.bits[corpus, model].bits for corpus in self.untouched])

        before = joined(self.baseline)
        return {
            model: relative_change(joined(model), before, draws=self.draws, seed=self.seed)
            for model in self.others
        }

    @functools.cached_property
    def translation_scores(self) -> dict[tuple[str, str, str], tuple[Interval, Interval | None]]:
        """By (metric, corpus, model): the score and, but for the baseline, its gain over the baseline's."""
        options: dict[str, int] = {"draws": self.draws, "seed": self.seed}
        scores: dict[tuple[str, str, str], tuple[Interval, Interval | None]] = {}
        for (corpus, model), scored in self.translations.items():
            for metric in scored.statistics:
                base = self.translations[corpus, self.baseline]
                gain = None if model == self.baseline else scored.difference(base, metric, **options)
                scores[metric, corpus, model] = scored.interval(metric, **options), gain
        return scores

    def metrics(self) -> dict[str, float]:
        """All figures by flat dotted names, as listed above."""
        found: dict[str, float] = {}
        for (corpus, model), interval in self.intervals.items():
            found |= interval.metrics(f"bpb.{corpus}.{model}")
        for (corpus, model, other), comparison in self.comparisons.items():
            name = self.name_of(corpus, model, other)
            found |= comparison.change.metrics(f"change.{name}")
            found[f"better.{name}"] = comparison.better / comparison.documents
            found[f"sign_p.{name}"] = comparison.sign_p
        for model, interval in self.forgetting.items():
            found |= interval.metrics(f"forgetting.{model}")
        for (corpus, model), counts in self.fertility.items():
            found[f"fertility.{corpus}.{model}"] = counts.per_byte
            if counts.words:
                found[f"tokens_per_word.{corpus}.{model}"] = counts.per_word
            found[f"lossy.{corpus}.{model}"] = counts.lossy
        for (metric, corpus, model), (score, gain) in self.translation_scores.items():
            found |= score.metrics(f"{metric}.{corpus}.{model}")
            if gain is not None:
                found |= gain.metrics(f"{metric}_gain.{corpus}.{model}")
        return found

    def scores(self) -> dict[str, Any]:
        """Every document's bytes, bits and tokens by corpus and model, JSON-like."""
        return {
            corpus: {
                "ids": documents.ids,
                "bytes": [len(text.encode()) for text in documents.texts],
                "models": {
                    model: {
                        "bits": [round(bits, 3) for bits in self.bits[corpus, model].bits.tolist()],
                        "tokens": [int(count) for count in self.bits[corpus, model].tokens],
                    }
                    for model in self.models
                },
            }
            for corpus, documents in self.documents.items()
        }
