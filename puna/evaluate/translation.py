"""Translation by prompt, scored with sacrebleu's chrF and BLEU, with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from puna.core.errors import PunaError
from puna.decode.engine import Engine, Prompt
from puna.decode.sampling import Sampling
from puna.evaluate.stages import PLACES
from puna.evaluate.statistics import Floats, Interval, percentile_interval, resamples

if TYPE_CHECKING:
    from puna.model.llama import Llama


@dataclass(frozen=True)
class Scored:
    """Hypotheses, references and, per metric, sacrebleu's additive statistics ``[sentences, numbers]``."""

    hypotheses: list[str]
    references: list[str]
    statistics: dict[str, Floats]
    metrics: dict[str, Any]

    def interval(self, name: str, *, draws: int, seed: int) -> Interval:
        """The corpus score (0 to 100) of metric ``name`` with its bootstrap interval over sentences."""
        value, drawn = self._scores(name, draws, seed)
        return _interval(value, drawn, len(self.references))

    def difference(self, baseline: Scored, name: str, *, draws: int, seed: int) -> Interval:
        """Score minus the baseline's, paired: both are drawn with the same sentences."""
        if self.references != baseline.references:
            raise PunaError("a paired comparison needs the same references on both sides")
        value, drawn = self._scores(name, draws, seed)
        other, other_drawn = baseline._scores(name, draws, seed)
        return _interval(value - other, drawn - other_drawn, len(self.references))

    def signature(self, name: str) -> str:
        """sacrebleu's signature: version, tokenisation and options of the score."""
        return str(self.metrics[name].get_signature())

    def _scores(self, name: str, draws: int, seed: int) -> tuple[float, Floats]:
        table = self.statistics[name]
        drawn = [row for weights in resamples(len(table), draws, seed) for row in weights @ table]
        return self._score(name, table.sum(axis=0)), numpy.array([self._score(name, row) for row in drawn])

    def _score(self, name: str, totals: Floats) -> float:
        return float(self.metrics[name]._compute_score_from_stats([round(total) for total in totals]).score)


def _interval(value: float, drawn: Floats, sentences: int) -> Interval:
    return percentile_interval(value, drawn) if sentences > 1 else Interval(value, float("nan"), float("nan"))


def score(hypotheses: Sequence[str], references: Sequence[str], *, target_language: str = "") -> Scored:
    """Collect chrF and BLEU statistics of hypotheses against one reference each.

    BLEU uses sacrebleu's 13a tokenisation, and its Chinese one where the target language is Chinese.
    """
    if len(hypotheses) != len(references) or not references:
        raise PunaError(
            "each hypothesis needs one reference",
            found=f"{len(hypotheses)} hypotheses, {len(references)} references",
        )
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise PunaError(
            "translation scores need sacrebleu", fix="install the extra: pip install 'puna[evaluate]'"
        ) from None
    chinese = target_language.lower().startswith(("zh", "chinese"))
    metrics = {"chrf": CHRF(), "bleu": BLEU(tokenize="zh" if chinese else "13a", force=True)}
    # As sacrebleu's own significance tests do, statistics are resampled: scoring each draw anew through
    # corpus_score would count n-grams for minutes. Nothing public gives chrF's, hence the bound on
    # sacrebleu's version; that scores equal corpus_score's is tested.
    statistics = {
        name: numpy.array(
            metric._extract_corpus_statistics(list(hypotheses), [list(references)]), dtype=numpy.float64
        )
        for name, metric in metrics.items()
    }
    return Scored(list(hypotheses), list(references), statistics, metrics)


def prompts(rows: Sequence[Mapping[str, Any]], text: str, *, chat: bool) -> list[Prompt]:
    """One prompt for each sentence pair: a string, or a user message where ``chat`` is true."""
    filled = [text.format(**{name: row[name] for name in PLACES}) for row in rows]
    return [[{"role": "user", "content": prompt}] for prompt in filled] if chat else list(filled)


def translate(model: Llama, asked: Sequence[Prompt], *, max_tokens: int, stop: tuple[str, ...]) -> list[str]:
    """Greedy answers to translation prompts, without white space around them."""
    completions = Engine(model).generate(asked, Sampling(max_tokens=max_tokens, stop=stop))
    return [completion.text.strip() for completion in completions]
