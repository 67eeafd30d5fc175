"""What Data-Juicer (S50, arXiv:2309.02033) claims, measured on a corpus: the stage ``juicer_checks``.

Orders and sharing change no survivor; sharing words saves time; thresholds are decided anew over stored
signals; Pareto's rule keeps with its probability; near-duplicates that were planted are found and others
are not; three standard deviations keep what they should of a normal distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core import seeds
from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.data.curate.checks_settings import JuicerChecksParameters
from puna.data.curate.execute import execute
from puna.data.curate.gates import Gate, passes
from puna.data.curate.operator import SketchColumns, apply_score, get_operator
from puna.data.curate.pipeline import Step, load_pipeline, make_pipeline
from puna.data.curate.scores.data_juicer_quality import draws
from puna.data.curate.texts import Texts
from puna.data.curate.tune import sigma_bounds

_DECISIONS = 50
_FREQUENT = "the\nof\nand\nto\na\nin\nis\nthat\nfor\nit\n"


def run(context: Context, parameters: JuicerChecksParameters) -> Outcome:
    """Do the work of the stage."""
    corpus = Corpus.open(context.inputs["corpus"], kind="documents")
    texts = list(islice(corpus.texts(), parameters.documents))
    if len(texts) < 100:
        raise PunaError("too few documents to measure anything", where=corpus.path, found=len(texts))
    listed = context.out / "frequent.txt"
    listed.write_text(_FREQUENT, encoding="utf-8")
    batches = [texts[at : at + parameters.batch] for at in range(0, len(texts), parameters.batch)]
    metrics = {"documents": float(len(texts))}
    metrics |= order_figures(parameters.preset, batches, parameters.orders, context.seed)
    metrics |= sharing_figures(batches, listed)
    metrics |= rethreshold_figures(parameters.preset, batches)
    metrics |= pareto_figures(parameters.draws, context.seed)
    metrics |= duplicate_figures(texts, parameters.planted, context.seed)
    metrics |= sigma_figures(parameters.draws, context.seed)
    return Outcome(metrics=metrics)


def local_steps(preset: str) -> list[Step]:
    """The scores of a preset and the gates that read them, without mappers and what needs all documents."""
    steps = load_pipeline(preset).steps
    stored = {name for step in steps if step.kind == "score" for name in step.signals()}
    return [s for s in steps if s.kind == "score" or (s.gate is not None and s.gate.signal in stored)]


def order_figures(preset: str, batches: Sequence[Sequence[str]], orders: int, seed: int) -> dict[str, float]:
    """Documents about which orders of gates, or scores that share nothing, disagree."""
    steps = local_steps(preset)
    pairs = [(step, [s for s in steps if s.gate and s.gate.signal in step.signals()]) for step in steps]
    pairs = [(step, gates) for step, gates in pairs if step.kind == "score"]
    generator = seeds.numpy_generator(seed, "orders")
    disagreements = kept = 0
    for batch in batches:
        shared = _kept(steps, Texts(batch))
        kept += int(shared.sum())
        alone = numpy.ones(len(batch), dtype=bool)
        for step, gates in pairs:
            alone &= _kept([step, *gates], Texts(batch))
        disagreements += int((alone != shared).sum())
        for _ in range(orders):
            order = generator.permutation(len(pairs)).tolist()
            shuffled = [one for place in order for one in (pairs[place][0], *pairs[place][1])]
            disagreements += int((_kept(shuffled, Texts(batch)) != shared).sum())
    return {"order.disagreements": float(disagreements), "order.kept": float(kept)}


def _kept(steps: Sequence[Step], texts: Texts) -> NDArray[numpy.bool_]:
    return numpy.array([not reason for reason in execute(steps, texts).dropped])


def sharing_figures(batches: Sequence[Sequence[str]], listed: Path) -> dict[str, float]:
    """Documents per second of five scores of words that share words, and that do not."""
    named: dict[str, dict[str, Any]] = {
        "words": {"score": "data_juicer.words"},
        "five": {"score": "data_juicer.word_repetition", "settings": {"n": 5}},
        "ten": {"score": "data_juicer.word_repetition", "settings": {"n": 10}},
        "stop": {"score": "data_juicer.stop_words", "settings": {"words": str(listed)}},
        "flagged": {"score": "data_juicer.flagged_words", "settings": {"words": str(listed)}},
    }
    steps = make_pipeline([{**step, "as": name} for name, step in named.items()]).steps

    def scored(texts: Callable[[], Texts]) -> float:
        started = time.process_time()
        for step in steps:
            assert step.operator is not None and step.settings is not None
            apply_score(step.operator, texts(), step.settings)
        return time.process_time() - started

    together = apart = 0.0
    for batch in batches:
        made = Texts(batch)
        together += scored(lambda made=made: made)  # type: ignore[misc]
        apart += scored(lambda batch=batch: Texts(batch))  # type: ignore[misc]
    count = sum(map(len, batches))
    together, apart = max(together, 1e-9), max(apart, 1e-9)
    return {
        "sharing.documents_per_second": count / together,
        "apart.documents_per_second": count / apart,
        "sharing.gain": apart / together,
    }


def rethreshold_figures(preset: str, batches: Sequence[Sequence[str]]) -> dict[str, float]:
    """How much faster thresholds are decided anew over stored signals than scores are worked out again."""
    steps = local_steps(preset)
    gates = [step.gate for step in steps if step.gate is not None]
    computed = decided = 0.0
    for batch in batches:
        started = time.process_time()
        done = execute(steps, Texts(batch), everything=True)
        computed += time.process_time() - started
        started = time.process_time()
        for _ in range(_DECISIONS):  # One takes less than the clock of some machines tells.
            passing = numpy.ones(len(batch), dtype=bool)
            for gate in gates:
                passing &= passes(gate, done.signals, [""] * len(batch))
        decided += (time.process_time() - started) / _DECISIONS
    return {"rethreshold.gain": computed / max(decided, 1e-9)}


def pareto_figures(count: int, seed: int) -> dict[str, float]:
    """What Pareto's rule keeps of documents with one score, and how many standard errors off that is."""
    drawn = draws(Texts([str(number) for number in range(count)]), 9.0, seed)
    metrics = {}
    for score in (0.5, 0.9):
        expected = (2 - score) ** -9
        kept = float((score > 1 - drawn).mean())
        error = (expected * (1 - expected) / count) ** 0.5
        metrics[f"pareto.kept_{score}"] = kept
        metrics[f"pareto.errors_{score}"] = abs(kept - expected) / error
    return metrics


class _Sketched:
    """What a global operator sketched, in memory."""

    def __init__(self, count: int, columns: SketchColumns) -> None:
        self.count = count
        self._columns = columns

    def ids(self) -> Sequence[str]:
        """Places as ids."""
        return [str(place) for place in range(self.count)]

    def read(self, name: str) -> NDArray[Any]:
        """A column."""
        column = self._columns[name]
        assert not isinstance(column, tuple)
        return column

    def ragged(self, name: str) -> tuple[NDArray[Any], NDArray[numpy.int64]]:
        """A ragged column."""
        column = self._columns[name]
        assert isinstance(column, tuple)
        return column


def duplicate_figures(texts: Sequence[str], planted: int, seed: int) -> dict[str, float]:
    """Recall of planted near-duplicates, and the share of other documents that are lost, by two methods.

    Documents are 100 words each, drawn from the corpus one by one, so that they are all different; each
    near-duplicate has one word of another document changed.
    """
    vocabulary = list(dict.fromkeys(word for text in texts[:5000] for word in text.split()))
    generator = seeds.numpy_generator(seed, "duplicates")
    drawn = generator.integers(0, len(vocabulary), size=(4 * planted, 100))
    originals = [[vocabulary[place] for place in row] for row in drawn.tolist()]
    copies = []
    for row in originals[:planted]:
        copy = list(row)
        copy[int(generator.integers(0, len(copy)))] = "changed"
        copies.append(copy)
    batch = Texts([" ".join(row) for row in (*originals, *copies)])
    metrics = {}
    methods: dict[str, dict[str, Any]] = {
        "minhash": {"threshold": 0.7, "permutations": 256, "bands": 25, "rows": 10},
        "simhash": {"ngram": 6, "blocks": 6, "distance": 4},
    }
    for name, values in methods.items():
        operator = get_operator("global", f"dedup.{name}")
        settings = operator.settings(**values)
        sketch = _Sketched(batch.count, operator.function.sketch(batch, settings))
        resolved: Iterator[Any] = operator.function.resolve([sketch], settings, Path())
        duplicate = numpy.asarray(next(iter(resolved)).signals["duplicate"]) == 1
        metrics[f"{name}.recall"] = float(duplicate[len(originals) :].mean())
        metrics[f"{name}.lost"] = float(duplicate[: len(originals)].mean())
    return metrics


def sigma_figures(count: int, seed: int) -> dict[str, float]:
    """The share of a normal distribution that a gate at three standard deviations keeps."""
    values = seeds.numpy_generator(seed, "sigma").normal(5.0, 2.0, size=count)
    gate = Gate(name="sigma", signal="x.x", minimum=0, maximum=0)
    bounds = sigma_bounds(gate, values, 3.0)
    tuned = Gate(name="sigma", signal="x.x", minimum=bounds["minimum"], maximum=bounds["maximum"])
    return {"sigma.kept": float(passes(tuned, {"x.x": values}, [""] * count).mean())}
