"""An evaluation as tables, interval plots and samples for people: JSON-like, for a terminal or a report."""

from __future__ import annotations

from typing import Any

from puna.evaluate.result import Comparison, Result
from puna.evaluate.statistics import Interval

_TRANSLATIONS_SHOWN = 3


def report(result: Result) -> dict[str, Any]:
    """What ``Context.report`` holds for an evaluation: tables, intervals to draw, samples."""
    tables = [_bits(result), _further(result), _forgetting(result), _translation(result)]
    return {
        "tables": [table for table in tables if table["rows"]],
        "intervals": [_drawn(result)] if result.bits else [],
        "samples": [*result.samples, *_translated(result)],
    }


def _bits(result: Result) -> dict[str, Any]:
    rows = []
    for (corpus, model), interval in result.intervals.items():
        comparison = result.comparisons.get((corpus, model, result.baseline))
        counts = result.fertility[corpus, model]
        rows.append(
            [
                corpus,
                model,
                f"{interval.value:.3f}",
                percent(comparison.change.value) if comparison else "baseline",
                percent_ends(comparison.change) if comparison else "",
                _better(comparison) if comparison else "",
                f"{counts.per_byte:.3f}",
                f"{counts.per_word:.2f}" if counts.words else "",
            ]
        )
    order = {corpus: place for place, corpus in enumerate(result.documents)}
    rows.sort(key=lambda row: order[row[0]])  # models were measured one after another; the sort is stable
    columns = [
        "corpus",
        "model",
        "bits/byte",
        "change",
        "95% interval",
        "fewer bits on",
        "tokens/byte",
        "tokens/word",
    ]
    return {"title": "Before and after", "columns": columns, "rows": rows, "note": _bits_note(result)}


def _bits_note(result: Result) -> str:
    sizes = []
    for corpus, documents in result.documents.items():
        size = sum(len(text.encode()) for text in documents.texts) / 1000
        share = (
            f"{len(documents.ids)} of {documents.of}"
            if len(documents.ids) < documents.of
            else f"{documents.of}"
        )
        sizes.append(f"{corpus}: {share} documents, {size:.1f} kB")
    lossy = sorted({(corpus, model) for (corpus, model), counts in result.fertility.items() if counts.lossy})
    warning = "".join(
        f" The tokenizer of {model} does not give back {result.fertility[corpus, model].lossy} documents"
        f" of {corpus} as they were; its bits per byte are too low there."
        for corpus, model in lossy
    )
    return (
        f"Lower is better. Change against {result.baseline}. {'; '.join(sizes)}. Intervals: paired bootstrap "
        f'over documents, {result.draws} draws; "fewer bits on" counts documents.{warning}'
    )


def _further(result: Result) -> dict[str, Any]:
    rows = [
        [corpus, model, other, percent(found.change.value), percent_ends(found.change), _better(found)]
        for (corpus, model, other), found in result.comparisons.items()
        if other != result.baseline
    ]
    columns = ["corpus", "model", "against", "change in bits/byte", "95% interval", "fewer bits on"]
    return {"title": "Further comparisons", "columns": columns, "rows": rows}


def _forgetting(result: Result) -> dict[str, Any]:
    rows = [
        [model, percent(change.value), percent_ends(change)] for model, change in result.forgetting.items()
    ]
    texts = ", ".join(result.untouched)
    note = f"Change in bits per byte of text that nothing was trained on ({texts}); above zero is loss."
    return {"title": "Forgetting", "columns": ["model", "change", "95% interval"], "rows": rows, "note": note}


def _translation(result: Result) -> dict[str, Any]:
    rows = []
    for (metric, corpus, model), (score, gain) in result.translation_scores.items():
        ends = f"{score.low:.1f} to {score.high:.1f}" if score.known else ""
        gained = "baseline" if gain is None else f"{gain.value:+.1f}"
        gained_ends = f"{gain.low:+.1f} to {gain.high:+.1f}" if gain is not None and gain.known else ""
        rows.append([corpus, model, metric, f"{score.value:.1f}", ends, gained, gained_ends])
    columns = ["corpus", "model", "metric", "score", "95% interval", "gain", "95% interval of the gain"]
    signatures = sorted(
        {scored.signature(name) for scored in result.translations.values() for name in scored.metrics}
    )
    sentences = ", ".join(f"{name} {len(pairs.rows)}" for name, pairs in result.pairs.items())
    note = f"Higher is better. Sentences: {sentences}. sacrebleu: {'; '.join(signatures)}"
    return {
        "title": "Translation",
        "columns": columns,
        "rows": rows,
        "note": note,
    }


def _translated(result: Result) -> list[dict[str, Any]]:
    """The first translations of each corpus, with the prompt as it was given and the reference."""
    return [
        {
            "label": f"translation, {corpus}",
            "prompt": pairs.prompts[place],
            "reference": pairs.rows[place]["target_text"],
            "outputs": {
                model: result.translations[corpus, model].hypotheses[place] for model in result.models
            },
        }
        for corpus, pairs in result.pairs.items()
        for place in range(min(_TRANSLATIONS_SHOWN, len(pairs.rows)))
    ]


def _drawn(result: Result) -> dict[str, Any]:
    rows = []
    for corpus in result.documents:
        for model in result.models:
            comparison = result.comparisons.get((corpus, model, result.baseline))
            row: dict[str, Any] = {"group": corpus, "label": model, **ends(result.intervals[corpus, model])}
            rows.append(row | ({"change": ends(comparison.change)} if comparison else {}))
    return {"title": "Bits per byte", "unit": "bits per byte", "baseline": result.baseline, "rows": rows}


def ends(interval: Interval) -> dict[str, float]:
    """A value with the ends of its interval where they are known, as charts take it."""
    return {"value": interval.value} | (
        {"low": interval.low, "high": interval.high} if interval.known else {}
    )


def percent(share: float) -> str:
    """A signed percentage with one decimal."""
    return f"{100 * share:+.1f}%"


def percent_ends(interval: Interval) -> str:
    """The ends of an interval as percentages, empty where it is not known."""
    return f"{percent(interval.low)} to {percent(interval.high)}" if interval.known else ""


def _better(comparison: Comparison) -> str:
    p = "p < 0.001" if comparison.sign_p < 0.001 else f"p = {comparison.sign_p:.3f}"
    return f"{comparison.better}/{comparison.documents} ({p})"
